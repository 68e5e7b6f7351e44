"""SIIM-ACR Pneumothorax Segmentation (Society for Imaging Informatics in Medicine, 2019), in its two releases.

    DICOM: train-rle.csv or stage_2_train.csv (ImageId, EncodedPixels), and anywhere below it one file an image,
           ImageId.dcm
    PNG:   png_images/, png_masks/ (the same names), stage_1_train_images.csv and stage_1_test_images.csv
           (new_filename, ImageId, has_pneumo)

`ImageId` is an image's SOP Instance UID and, in both releases, its id here. A pneumothorax in several pieces has
several rows in the list of codes, which become several masks; a code counts the pixels of its own image, which has
1024 x 1024 of them, so that it does not fit copies of another size. An image known to have none, whose code is "-1"
or blank, has the one empty mask "-1", so that it differs from an image of which nothing is known, whose masks are
null. Rows that contradict each other, and values that are not understood, make an image unknown.

The test part are the images of stage_1_test_images.csv, or those of which the lists say nothing; where none of
these is here, and for training and validation, a hash of the image's id decides. No file tells the patients but
the DICOM headers, where each image has a patient of its own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rle
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_files import PATH, files_below, image_ids, image_key, list_images
from cxr.sources.label_rows import contradictions_note, merged_row, rows_by_image, unknown_words_note
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient

name = "siim"

FINDING = "Pneumothorax"  # also the masks' label
CODES_FILE, STAGE_2_FILE = "train-rle.csv", "stage_2_train.csv"  # the second, with more images, counts if both exist
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
    """What a release says of one image; `masks` is None where it says nothing of its mask."""

    image_id: str
    label: int
    masks: list[Mask] | None
    is_test: bool = False
    extra: str | None = None


def detect(uri: str) -> bool:
    return _has_pictures(uri) or _codes_file(uri) is not None


def manifest(uri: str) -> Manifest:
    """Every image file once, with what the release's lists say of it; notes count what is only here or only there.

    Raises:
        UserError: the lists are missing or broken, or there is no image.
    """
    codes_file = _codes_file(uri)
    if _has_pictures(uri):
        lists, images, has_test_list = f"{TRAIN_FILE} and {TEST_FILE}", storage.join(uri, IMAGES), True
        entries, list_notes = _from_pictures(uri)
    elif codes_file:
        lists, images, has_test_list = codes_file, uri, False
        entries, list_notes = _from_codes(storage.join(uri, codes_file))
    else:
        missing = f"neither {CODES_FILE} nor {STAGE_2_FILE} nor {IMAGES}/ with {TRAIN_FILE}"
        raise UserError(f"{uri} has {missing}: put them there, or choose the source folder")
    files, notes = list_images(images)
    keys = [image_key(path) for path in files[PATH].to_pylist()]
    notes += [*_presence_notes(lists, entries, keys), *list_notes]
    told = [entries.get(key) or _Entry(key, schema.UNKNOWN, None, is_test=True) for key in keys]
    columns, id_notes = _columns(files, told, has_test_list)
    lost = sum(entry.label == schema.POSITIVE and entry.masks is None for entry in told)
    notes += [f"{lost:,} images with a pneumothorax have no mask that can be read"] if lost else []
    return Manifest(manifest_table(columns), (FINDING,), [*notes, *id_notes])


def _codes_file(uri: str) -> str | None:
    stage_2 = storage.join(uri, STAGE_2_FILE)
    if storage.exists(stage_2) and has_columns(stage_2, (IMAGE_ID, CODE)):  # other challenges use this name too
        return STAGE_2_FILE
    return CODES_FILE if storage.exists(storage.join(uri, CODES_FILE)) else None


def _has_pictures(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, each)) for each in (TRAIN_FILE, IMAGES))


def _columns(
    files: pa.Table, told: Sequence[_Entry], has_test_list: bool
) -> tuple[dict[str, pa.Array | pa.ChunkedArray], list[str]]:
    """The manifest's columns, and notes.

    Without a test list the images without a row are in the test split, and so are some with one: otherwise that split
    would have no truth.
    """
    names = pa.array([entry.image_id for entry in told], pa.string())
    ids, notes = image_ids(files[PATH].combine_chunks(), names)
    is_test = np.array([entry.is_test for entry in told])
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: names,
        schema.SPLIT: split_by_patient(names, is_test, ~is_test if has_test_list and is_test.any() else None),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.array([[entry.label] for entry in told], np.int8)),
        schema.MASKS: pa.array([entry.masks for entry in told], schema.MANIFEST.field(schema.MASKS).type),
        schema.EXTRA: pa.array([entry.extra for entry in told], pa.string()),
    }
    return columns, notes


# ---- The published lists


def _from_codes(location: str) -> tuple[dict[str, _Entry], list[str]]:
    """Entries of the DICOM release, by `image_key`, and notes."""
    table = read_csv(location, (IMAGE_ID, CODE))
    codes = table.column(CODE)
    entries: dict[str, _Entry] = {}
    strange: Counter[str] = Counter()
    contradictory = 0
    for image, rows in rows_by_image(table, IMAGE_ID).items():
        given = dict.fromkeys(codes[row] for row in rows)  # the same row twice is one
        pieces = [code for code in given if _is_piece(code)]
        empty = [code for code in given if code in _NO_MASK]
        others = [code for code in given if code not in pieces and code not in empty]
        strange.update(others)
        contradictory += bool(pieces and empty)
        if pieces and not empty:
            entries[image] = _Entry(image, schema.POSITIVE, None if others else [_mask(code=code) for code in pieces])
        elif empty and not pieces and not others:
            entries[image] = _Entry(image, schema.NEGATIVE, [_mask(code=rle.EMPTY)])
        else:
            entries[image] = _Entry(image, schema.UNKNOWN, None)
    file = storage.name(location)
    notes = unknown_words_note(strange, file, "the masks of these images are unknown")
    return entries, notes + contradictions_note(contradictory, file)


def _is_piece(code: str) -> bool:
    """Whether this is a list of pairs of whole numbers."""
    numbers = code.split()
    return bool(numbers) and len(numbers) % 2 == 0 and code.isascii() and "".join(numbers).isdecimal()


def _from_pictures(uri: str) -> tuple[dict[str, _Entry], list[str]]:
    """Entries of the PNG release, by `image_key` of its files, and notes.

    The mask is a picture where there is a pneumothorax; the other pictures, all black, need not be read.
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
    pictures = {image_key(entry.path): entry.uri for entry in files_below(storage.join(uri, MASKS))}
    entries: dict[str, _Entry] = {}
    strange: Counter[str] = Counter()
    contradictory = 0
    for key, each in rows.items():
        merged, differ = merged_row(each)
        contradictory += differ
        strange.update(text for *_, text in each if text.casefold() not in _LABELS)
        label = _LABELS.get(merged[2].casefold(), schema.UNKNOWN)
        masks = [_mask(code=rle.EMPTY)] if label == schema.NEGATIVE else None
        if label == schema.POSITIVE and key in pictures:
            masks = [_mask(uri=pictures[key])]
        extra = json.dumps(dict(zip(columns, merged, strict=True)))
        entries[key] = _Entry(image_key(merged[1]) or key, label, masks, key in listed[TEST_FILE], extra)
    notes = unknown_words_note(strange, f"{HAS_PNEUMOTHORAX} in {TRAIN_FILE}", "these images are unknown")
    notes += contradictions_note(contradictory, f"{TRAIN_FILE} and {TEST_FILE}")
    if both := len(listed[TRAIN_FILE] & listed[TEST_FILE]):
        notes.append(f"{both:,} images are in both {TRAIN_FILE} and {TEST_FILE}: they are used for testing")
    return entries, notes


def _mask(code: str | None = None, uri: str | None = None) -> Mask:
    return {schema.LABEL: FINDING, schema.MASK_RLE: code, schema.MASK_URI: uri}


def _presence_notes(file: str, listed: Mapping[str, _Entry], here: Sequence[str]) -> list[str]:
    """Words on listed images that are not here, and on images that are not listed."""
    missing, untold = len(listed.keys() - set(here)), len([each for each in here if each not in listed])
    notes = []
    if missing:
        lost = f"{missing:,} of the {len(listed):,} images that {file} lists"
        notes.append(f"{lost} are not here; going on with {len(here):,}")
    if untold:
        notes.append(f"{untold:,} images are not listed in {file}: whether they have a pneumothorax is unknown")
    return notes
