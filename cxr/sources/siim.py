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
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rle
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_files import PATH, files_below, image_ids, image_key, image_keys, list_images
from cxr.sources.image_table import listing_notes
from cxr.sources.label_rows import (
    contradictions_note,
    listed_keys,
    merged_row,
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

_LABELS = {
    **dict.fromkeys(("1", "1.0", "true"), schema.POSITIVE),
    **dict.fromkeys(("0", "0.0", "false"), schema.NEGATIVE),
}

_PIECE = r"^\d+{0}\d+(?:{0}\d+{0}\d+)*$".format(r"[\s\x0b\x1c-\x1f]+")  # pairs of non-negative integers
_MASKS_TYPE = schema.MANIFEST.field(schema.MASKS).type
_KEY, _ROW = "key", "row"  # columns while the codes are read


@dataclass(frozen=True)
class _Entries:
    """The images in the lists, each once."""

    keys: pa.Array  # by `image_key`
    image_ids: pa.Array
    labels: np.ndarray  # (N,) int8
    masks: pa.Array  # as schema.MASKS; null if they are unknown
    is_test: np.ndarray  # (N,) bool
    extra: pa.Array


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
    paths = files[PATH].combine_chunks()
    keys = image_keys(paths)
    row = pc.index_in(keys, value_set=entries.keys)
    notes += [*listing_notes(lists, len(entries.keys), row, "pneumothorax is unknown"), *list_notes]
    names = pc.coalesce(entries.image_ids.take(row), keys)
    ids, id_notes = image_ids(paths, names)
    at = pc.fill_null(row, len(entries.keys)).to_numpy()
    labels, is_test = np.append(entries.labels, np.int8(schema.UNKNOWN))[at], np.append(entries.is_test, True)[at]
    masks = entries.masks.take(row)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: names,
        schema.SPLIT: split_by_patient(names, is_test, ~is_test if has_test_list and is_test.any() else None),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(labels[:, None]),
        schema.MASKS: masks,
        schema.EXTRA: entries.extra.take(row),
    }
    lost = int(((labels == schema.POSITIVE) & masks.is_null().to_numpy(zero_copy_only=False)).sum())
    notes += [f"with a pneumothorax but without a readable mask: {counted(lost, 'image')}"] if lost else []
    return Manifest(manifest_table(columns), (FINDING,), [*notes, *id_notes])


def _codes_file(uri: str) -> str | None:
    stage_2 = storage.join(uri, STAGE_2_FILE)
    if storage.exists(stage_2) and has_columns(stage_2, (IMAGE_ID, CODE)):  # other challenges use this file name too
        return STAGE_2_FILE
    return CODES_FILE if storage.exists(storage.join(uri, CODES_FILE)) else None


def _is_png_release(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, each)) for each in (TRAIN_FILE, IMAGES))


# ---- The published lists


def _from_dicom_release(location: str) -> tuple[_Entries, list[str]]:
    """The list of the DICOM release, and notes."""
    table = read_csv(location, (IMAGE_ID, CODE))
    rows = pa.table({_KEY: listed_keys(table, IMAGE_ID), CODE: table.texts(CODE), _ROW: np.arange(len(table))})
    rows = rows.group_by([_KEY, CODE], use_threads=False).aggregate([(_ROW, "min")])  # repeated rows count once
    rows = rows.sort_by(f"{_ROW}_min").combine_chunks()
    codes = rows[CODE].combine_chunks()
    encoded = rows[_KEY].combine_chunks().dictionary_encode()
    image_N, images = encoded.indices.to_numpy(), len(encoded.dictionary)  # numbered as they first occur
    del rows
    is_empty = pc.is_in(codes, value_set=pa.array(rle.NO_MASK)).to_numpy(zero_copy_only=False)
    is_piece = ~is_empty & pc.match_substring_regex(codes, _PIECE).to_numpy(zero_copy_only=False)
    unusable = ~is_empty & ~is_piece
    pieces, empty, other = (
        np.bincount(image_N[chosen], minlength=images) > 0 for chosen in (is_piece, is_empty, unusable)
    )
    positive, negative = pieces & ~empty, empty & ~pieces & ~other
    known = negative | (positive & ~other)

    first_empty = np.zeros(len(codes), bool)
    first_empty[np.flatnonzero(is_empty)[np.unique(image_N[is_empty], return_index=True)[1]]] = True
    of_masks = np.flatnonzero((is_piece | first_empty) & known[image_N])
    of_masks = of_masks[np.argsort(image_N[of_masks], kind="stable")]
    texts = pc.if_else(pa.array(is_empty[of_masks]), rle.EMPTY, codes.take(pa.array(of_masks)))
    ends = np.cumsum(np.bincount(image_N[of_masks], minlength=images), dtype=np.int32)
    column = {schema.LABEL: pa.repeat(FINDING, len(texts)), schema.MASK_RLE: texts}
    fields = [column.get(field.name, pa.nulls(len(texts), field.type)) for field in schema.MASK_SOURCE_TYPE]
    masks = pa.ListArray.from_arrays(
        np.insert(ends, 0, 0),
        pa.StructArray.from_arrays(fields, fields=list(schema.MASK_SOURCE_TYPE)),
        type=_MASKS_TYPE,
        mask=pa.array(~known),
    )
    unusable_rows = np.flatnonzero(unusable)
    unusable_rows = unusable_rows[np.argsort(image_N[unusable_rows], kind="stable")]
    unknown_words = Counter(codes.take(pa.array(unusable_rows)).to_pylist())
    labels = np.select([positive, negative], [schema.POSITIVE, schema.NEGATIVE], schema.UNKNOWN).astype(np.int8)
    entries = _Entries(
        encoded.dictionary,
        encoded.dictionary,
        labels,
        masks,
        np.zeros(images, bool),
        pa.nulls(images, pa.string()),
    )
    file = storage.name(location)
    notes = unknown_words_note(unknown_words, file, "the masks of these images are unknown")
    return entries, notes + contradictions_note(int((pieces & empty).sum()), file)


def _from_png_release(uri: str) -> tuple[_Entries, list[str]]:
    """The lists of the PNG release, and notes.

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
    ids: list[str] = []
    labels: list[int] = []
    all_masks: list[list[dict[str, str]] | None] = []
    extras: list[str] = []
    unknown_words: Counter[str] = Counter()
    contradictory = 0
    for key, each in rows.items():
        merged, differ = merged_row(each)
        contradictory += differ
        unknown_words.update(text for *_, text in each if text.casefold() not in _LABELS)
        label = _LABELS.get(merged[2].casefold(), schema.UNKNOWN)
        masks = [{schema.LABEL: FINDING, schema.MASK_RLE: rle.EMPTY}] if label == schema.NEGATIVE else None
        if label == schema.POSITIVE and key in mask_files:
            masks = [{schema.LABEL: FINDING, schema.MASK_URI: mask_files[key]}]
        ids.append(image_key(merged[1]) or key)
        labels.append(label)
        all_masks.append(masks)
        extras.append(json.dumps(dict(zip(columns, merged, strict=True))))
    entries = _Entries(
        pa.array(list(rows), pa.string()),
        pa.array(ids, pa.string()),
        np.array(labels, np.int8),
        pa.array(all_masks, _MASKS_TYPE),
        np.array([key in listed[TEST_FILE] for key in rows], bool),
        pa.array(extras, pa.string()),
    )
    notes = unknown_words_note(
        unknown_words, f"{HAS_PNEUMOTHORAX} in {TRAIN_FILE}", "the labels of these images are unknown"
    )
    notes += contradictions_note(contradictory, f"{TRAIN_FILE} and {TEST_FILE}")
    if both := len(listed[TRAIN_FILE] & listed[TEST_FILE]):
        notes.append(f"listed in both {TRAIN_FILE} and {TEST_FILE}, used for testing: {counted(both, 'image')}")
    return entries, notes
