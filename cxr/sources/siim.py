"""SIIM-ACR Pneumothorax Segmentation (Society for Imaging Informatics in Medicine, 2019), in its two releases.

    DICOM: train-rle.csv (ImageId, EncodedPixels), and anywhere below it one file an image, ImageId.dcm
    PNG:   png_images/, png_masks/ (the same names), stage_1_train_images.csv and stage_1_test_images.csv
           (new_filename, ImageId, has_pneumo)

`ImageId` is an image's SOP Instance UID and, in both releases, its id here. A pneumothorax in several pieces has
several rows in train-rle.csv, which become several masks; a code counts the pixels of its own image, which has
1024 x 1024 of them, so that it does not fit copies of another size. An image known to have none has the one empty
mask "-1", so that it differs from an image of which nothing is known, whose masks are null.

The test part are the images of stage_1_test_images.csv, or those of which the lists say nothing; where none of
these is here, and for training and validation, a hash of the image's id decides. No file tells the patients but
the DICOM headers, where each image has a patient of its own.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rle
from cxr.sources.base import Manifest, labels_column, manifest_table
from cxr.sources.listing import PATH, files_below, image_ids, list_images
from cxr.sources.splits import split_by_patient

name = "siim"

FINDING = "Pneumothorax"  # also the masks' label
CODES_FILE = "train-rle.csv"
IMAGES, MASKS = "png_images", "png_masks"
TRAIN_FILE, TEST_FILE = "stage_1_train_images.csv", "stage_1_test_images.csv"

# Columns of those files, read without the space before the second one's name in train-rle.csv.
IMAGE_ID, CODE = "ImageId", "EncodedPixels"
FILE_NAME, HAS_PNEUMOTHORAX = "new_filename", "has_pneumo"

_LABELS = {"1": schema.POSITIVE, "0": schema.NEGATIVE}
_SUFFIX = r"(?i)\.(dcm|dicom|png|jpe?g)$"

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
    return _has_pictures(uri) or storage.exists(storage.join(uri, CODES_FILE))


def manifest(uri: str) -> Manifest:
    """Every image file once, with what the release's lists say of it; notes count what is only here or only there.

    Raises:
        UserError: the lists are missing or broken, or there is no image.
    """
    if _has_pictures(uri):
        entries, lists, images = _from_pictures(uri), f"{TRAIN_FILE} and {TEST_FILE}", storage.join(uri, IMAGES)
    elif storage.exists(storage.join(uri, CODES_FILE)):
        entries, lists, images = _from_codes(uri), CODES_FILE, uri
    else:
        wanted = f"neither {CODES_FILE} nor {IMAGES}/ with {TRAIN_FILE}"
        raise UserError(f"{uri} has {wanted}: put them there, or choose the source folder")
    files, notes = list_images(images)
    stems = pc.replace_substring_regex(files[PATH].combine_chunks(), r"^.*/", "")
    stems = pc.replace_substring_regex(stems, _SUFFIX, "").to_pylist()
    notes += _presence_notes(lists, entries, stems)
    told = [entries.get(stem) or _Entry(stem, schema.UNKNOWN, None, is_test=True) for stem in stems]
    columns, id_notes = _columns(files, told, lists != CODES_FILE)
    return Manifest(manifest_table(columns), (FINDING,), [*notes, *id_notes])


def _has_pictures(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, each)) for each in (TRAIN_FILE, IMAGES))


def _columns(
    files: pa.Table, told: Sequence[_Entry], has_test_list: bool
) -> tuple[dict[str, pa.Array | pa.ChunkedArray], list[str]]:
    """The manifest's columns, and notes.

    Without a test list the images without a row are in the test split, but so are some with one: else nothing there
    could be judged.
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
    lost = sum(entry.label == schema.POSITIVE and entry.masks is None for entry in told)
    return columns, [*notes, *([f"{lost:,} images with a pneumothorax have no mask in {MASKS}"] if lost else [])]


# ---- The published lists


def _from_codes(uri: str) -> dict[str, _Entry]:
    """Entries of the DICOM release, by its files' names without suffix."""
    codes: dict[str, list[str]] = defaultdict(list)
    for row in _read(storage.join(uri, CODES_FILE), (IMAGE_ID, CODE)):
        codes[row[IMAGE_ID]].append(row[CODE])
    return {image: _coded(image, each) for image, each in codes.items()}


def _coded(image: str, codes: Sequence[str]) -> _Entry:
    """A mask a piece of the pneumothorax, or the empty one where all of the image's rows say that there is none."""
    pieces = [_mask(code=code) for code in codes if code != rle.EMPTY]
    return _Entry(image, int(bool(pieces)), pieces or [_mask(code=rle.EMPTY)])


def _from_pictures(uri: str) -> dict[str, _Entry]:
    """Entries of the PNG release, by its files' names without suffix."""
    drawn = {entry.path for entry in files_below(storage.join(uri, MASKS))}
    entries = {}
    for file in (TRAIN_FILE, TEST_FILE):
        location = storage.join(uri, file)
        rows = _read(location, (FILE_NAME, IMAGE_ID, HAS_PNEUMOTHORAX)) if storage.exists(location) else ()
        entries |= {
            re.sub(_SUFFIX, "", row[FILE_NAME]): _pictured(uri, row, drawn, file == TEST_FILE) for row in rows
        }
    return entries


def _pictured(uri: str, row: dict[str, str], drawn: Set[str], is_test: bool) -> _Entry:
    """The mask is a picture where there is a pneumothorax; the other pictures, all black, need not be read."""
    label, file = _LABELS.get(row[HAS_PNEUMOTHORAX], schema.UNKNOWN), row[FILE_NAME]
    masks = [_mask(code=rle.EMPTY)] if label == schema.NEGATIVE else None
    if label == schema.POSITIVE and file in drawn:
        masks = [_mask(uri=storage.join(uri, MASKS, file))]
    return _Entry(row[IMAGE_ID], label, masks, is_test, json.dumps(row))


def _mask(code: str | None = None, uri: str | None = None) -> Mask:
    return {schema.LABEL: FINDING, schema.MASK_RLE: code, schema.MASK_URI: uri}


def _read(location: str, wanted: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a list in its wanted columns, without spaces around names and values."""
    header, _, body = storage.read_bytes(location).partition(b"\n")
    columns = [column.strip() for column in next(csv.reader([header.decode("utf-8-sig", "replace")]), ())]
    if missing := set(wanted) - set(columns):
        raise UserError(f"{location} lacks the columns {sorted(missing)}; its header gives {columns}: fetch it again")
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(body),
            pa_csv.ReadOptions(column_names=columns, block_size=len(body) + 1),  # a code may be of any length
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), include_columns=wanted
            ),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{location} cannot be read as CSV ({str(error)[:200]}): fetch it again") from None
    return pa.table({each: pc.utf8_trim_whitespace(table[each]) for each in wanted}).to_pylist()


def _presence_notes(file: str, listed: Mapping[str, Any], here: Sequence[str]) -> list[str]:
    """Words on listed images that are not here, and on images that are not listed."""
    missing, untold = len(listed.keys() - set(here)), len([each for each in here if each not in listed])
    notes = []
    if missing:
        lost = f"{missing:,} of the {len(listed):,} images that {file} lists"
        notes.append(f"{lost} are not here; going on with {len(here):,}")
    if untold:
        notes.append(f"{untold:,} images are not listed in {file}: whether they have a pneumothorax is unknown")
    return notes
