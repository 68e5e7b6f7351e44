"""SIIM-ACR Pneumothorax Segmentation (Society for Imaging Informatics in Medicine, 2019), DICOM or PNG release.

    DICOM: train-rle.csv or stage_2_train.csv (ImageId, EncodedPixels); one file ImageId.dcm per image, anywhere below
    PNG:   png_images/, png_masks/ (the same names), stage_1_train_images.csv and stage_1_test_images.csv
           (new_filename, ImageId, has_pneumo)

`ImageId` is an image's SOP Instance UID and its id here, in both releases. A pneumothorax in several pieces has
several rows in the list of codes, which become several masks. A code applies to the original 1024 x 1024 pixels, so
it does not fit copies of another size. An image without pneumothorax, whose code is "-1" or blank, has one empty mask
"-1"; an image about which nothing is known has null masks. Contradictory rows and unrecognized values make an image
unknown.

The test split consists of the images in stage_1_test_images.csv or, in the DICOM release, of those that are not
listed. If there are none of these, and for training and validation, a hash of the image's id decides. Only DICOM
headers name patients, and there each image has a patient of its own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rle
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_files import PATH, files_below, image_ids, image_key, list_images
from cxr.sources.label_rows import (
    contradictions_note,
    merged_row,
    presence_notes,
    rows_by_image,
    unknown_words_note,
)
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "siim"

FINDING = "Pneumothorax"  # also the label of the masks
CODES_FILE, STAGE_2_FILE = "train-rle.csv", "stage_2_train.csv"  # the second has more images and takes precedence
IMAGES, MASKS = "png_images", "png_masks"
TRAIN_FILE, TEST_FILE = "stage_1_train_images.csv", "stage_1_test_images.csv"

# Columns of those files.
IMAGE_ID, CODE = "ImageId", "EncodedPixels"
FILE_NAME, HAS_PNEUMOTHORAX = "new_filename", "has_pneumo"

_NO_MASK = ("", rle.EMPTY, f"{rle.EMPTY}.0")
_LABELS = {
    **dict.fromkeys(("1", "1.0", "true"), schema.POSITIVE),
    **dict.fromkeys(("0", "0.0", "false"), schema.NEGATIVE),
}

Mask = dict[str, str | None]


@dataclass(frozen=True)
class _Entry:
    """The entry of an image in the lists; `masks` is None if they are unknown."""

    image_id: str
    label: int
    masks: list[Mask] | None
    is_test: bool = False
    extra: str | None = None


def detect(uri: str) -> bool:
    return _is_png_release(uri) or _codes_file(uri) is not None


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the release's lists; notes count missing and unlisted images.

    Raises:
        UserError: the lists are missing or damaged, or there are no images.
    """
    codes_file = _codes_file(uri)
    if _is_png_release(uri):
        lists, images, has_test_list = f"{TRAIN_FILE} and {TEST_FILE}", storage.join(uri, IMAGES), True
        entries, list_notes = _from_png_release(uri)
    elif codes_file:
        lists, images, has_test_list = codes_file, uri, False
        entries, list_notes = _from_dicom_release(storage.join(uri, codes_file))
    else:
        expected = f"{CODES_FILE}, {STAGE_2_FILE} or {IMAGES}/ with {TRAIN_FILE}"
        raise UserError(f"expected {expected} in {uri}, got none of them: add them, or use --source folder")
    files, notes = list_images(images)
    keys = [image_key(path) for path in files[PATH].to_pylist()]
    missing, unlisted = len(entries.keys() - set(keys)), sum(key not in entries for key in keys)
    notes += presence_notes(lists, len(entries), missing, len(keys), unlisted, "pneumothorax is unknown")
    notes += list_notes
    by_file = [entries.get(key) or _Entry(key, schema.UNKNOWN, None, is_test=True) for key in keys]
    columns, id_notes = _columns(files, by_file, has_test_list)
    lost = sum(entry.label == schema.POSITIVE and entry.masks is None for entry in by_file)
    notes += [f"with a pneumothorax but without a readable mask: {counted(lost, 'image')}"] if lost else []
    return Manifest(manifest_table(columns), (FINDING,), [*notes, *id_notes])


def _codes_file(uri: str) -> str | None:
    stage_2 = storage.join(uri, STAGE_2_FILE)
    if storage.exists(stage_2) and has_columns(stage_2, (IMAGE_ID, CODE)):  # other challenges use this file name too
        return STAGE_2_FILE
    return CODES_FILE if storage.exists(storage.join(uri, CODES_FILE)) else None


def _is_png_release(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, each)) for each in (TRAIN_FILE, IMAGES))


def _columns(
    files: pa.Table, entries: Sequence[_Entry], has_test_list: bool
) -> tuple[dict[str, pa.Array | pa.ChunkedArray], list[str]]:
    """The manifest's columns, and notes.

    Without a test list, unlisted images are in the test split, and some listed ones as well, because otherwise that
    split would have no ground truth.
    """
    names = pa.array([entry.image_id for entry in entries], pa.string())
    ids, notes = image_ids(files[PATH].combine_chunks(), names)
    is_test = np.array([entry.is_test for entry in entries])
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: names,
        schema.SPLIT: split_by_patient(names, is_test, ~is_test if has_test_list and is_test.any() else None),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.array([[entry.label] for entry in entries], np.int8)),
        schema.MASKS: pa.array([entry.masks for entry in entries], schema.MANIFEST.field(schema.MASKS).type),
        schema.EXTRA: pa.array([entry.extra for entry in entries], pa.string()),
    }
    return columns, notes


# ---- The published lists


def _from_dicom_release(location: str) -> tuple[dict[str, _Entry], list[str]]:
    """Entries of the DICOM release, by `image_key`, and notes."""
    table = read_csv(location, (IMAGE_ID, CODE))
    codes = table.column(CODE)
    entries: dict[str, _Entry] = {}
    unknown_words: Counter[str] = Counter()
    contradictory = 0
    for image, rows in rows_by_image(table, IMAGE_ID).items():
        row_codes = dict.fromkeys(codes[row] for row in rows)  # repeated rows count once
        pieces = [code for code in row_codes if _is_piece(code)]
        empty = [code for code in row_codes if code in _NO_MASK]
        unusable = [code for code in row_codes if code not in pieces and code not in empty]
        unknown_words.update(unusable)
        contradictory += bool(pieces and empty)
        if pieces and not empty:
            entries[image] = _Entry(
                image, schema.POSITIVE, None if unusable else [_mask(code=code) for code in pieces]
            )
        elif empty and not pieces and not unusable:
            entries[image] = _Entry(image, schema.NEGATIVE, [_mask(code=rle.EMPTY)])
        else:
            entries[image] = _Entry(image, schema.UNKNOWN, None)
    file = storage.name(location)
    notes = unknown_words_note(unknown_words, file, "the masks of these images are unknown")
    return entries, notes + contradictions_note(contradictory, file)


def _is_piece(code: str) -> bool:
    """Whether the code is a list of pairs of non-negative integers."""
    numbers = code.split()
    return bool(numbers) and len(numbers) % 2 == 0 and code.isascii() and "".join(numbers).isdecimal()


def _from_png_release(uri: str) -> tuple[dict[str, _Entry], list[str]]:
    """Entries of the PNG release, by `image_key` of its files, and notes.

    Mask files are used only for images with a pneumothorax; the others are black and need not be read.
    """
    columns = (FILE_NAME, IMAGE_ID, HAS_PNEUMOTHORAX)
    rows: dict[str, list[list[str]]] = defaultdict(list)
    listed: dict[str, set[str]] = {TRAIN_FILE: set(), TEST_FILE: set()}
    for file in listed:
        if storage.exists(location := storage.join(uri, file)):
            table = read_csv(location, columns)
            values = list(zip(*map(table.column, columns), strict=True))
            for key, each in rows_by_image(table, FILE_NAME).items():
                rows[key] += [list(values[row]) for row in each]
                listed[file].add(key)
    mask_files = {image_key(entry.path): entry.uri for entry in files_below(storage.join(uri, MASKS))}
    entries: dict[str, _Entry] = {}
    unknown_words: Counter[str] = Counter()
    contradictory = 0
    for key, each in rows.items():
        merged, differ = merged_row(each)
        contradictory += differ
        unknown_words.update(text for *_, text in each if text.casefold() not in _LABELS)
        label = _LABELS.get(merged[2].casefold(), schema.UNKNOWN)
        masks = [_mask(code=rle.EMPTY)] if label == schema.NEGATIVE else None
        if label == schema.POSITIVE and key in mask_files:
            masks = [_mask(uri=mask_files[key])]
        extra = json.dumps(dict(zip(columns, merged, strict=True)))
        entries[key] = _Entry(image_key(merged[1]) or key, label, masks, key in listed[TEST_FILE], extra)
    notes = unknown_words_note(
        unknown_words, f"{HAS_PNEUMOTHORAX} in {TRAIN_FILE}", "the labels of these images are unknown"
    )
    notes += contradictions_note(contradictory, f"{TRAIN_FILE} and {TEST_FILE}")
    if both := len(listed[TRAIN_FILE] & listed[TEST_FILE]):
        notes.append(f"listed in both {TRAIN_FILE} and {TEST_FILE}, used for testing: {counted(both, 'image')}")
    return entries, notes


def _mask(code: str | None = None, uri: str | None = None) -> Mask:
    return {schema.LABEL: FINDING, schema.MASK_RLE: code, schema.MASK_URI: uri}
