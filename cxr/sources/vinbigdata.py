"""VinBigData Chest X-ray Abnormalities Detection (VinDr-CXR, Nguyen et al. 2022), as DICOM or a PNG or JPEG copy.

    train.csv                       image_id, class_name, class_id, rad_id, x_min, y_min, x_max, y_max
    train/IMAGE_ID.dicom            or .png, .jpg; anywhere below the archive's root
    test/IMAGE_ID.dicom             without labels
    train_meta.csv, test_meta.csv   image_id, dim0, dim1: the original's height and width, for copies

Three of seventeen radiologists read each image in train.csv. The manifest contains all their boxes with their
readers, in pixels of the original. Copies of any size can be read if the original size is known from train_meta.csv
or, as in some copies, from columns width and height in train.csv and test.csv. An image in which no reader marked
anything has an empty list of boxes, not null.

The patients are unknown, so each image has its own. Its split is a hash of its id. Images that are not in train.csv
are in the test split, and some that are as well, because otherwise that split would have no ground truth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement
from cxr.sources.annotations import FRAME, HEADER, IMAGE, Read, frames_of, joined_frames, read, read_frames
from cxr.sources.csv_table import has_columns
from cxr.sources.image_files import PATH, image_ids, image_keys, list_images
from cxr.sources.image_table import listing_notes
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "vinbigdata"

ANNOTATIONS_FILE = "train.csv"
TEST_FILE = "test.csv"  # in some copies: image_id, width, height
META_FILES = ("train_meta.csv", "test_meta.csv")
HEIGHT, WIDTH = "dim0", "dim1"  # the original's, in pixels
TRAIN, TEST = "train", "test"  # folders
DICOM = (".dicom", ".dcm")


def detect(uri: str) -> bool:
    location = storage.join(uri, ANNOTATIONS_FILE)
    return storage.exists(location) and has_columns(location, HEADER[:4])


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to train.csv; notes count missing and unlisted images.

    Raises:
        UserError: train.csv is missing or damaged, or there are no images.
    """
    location = storage.join(uri, ANNOTATIONS_FILE)
    if not storage.exists(location):
        raise UserError(f"expected {ANNOTATIONS_FILE} in {uri}, got none: add it, or use --source folder")
    annotations = read(location)
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    stems = image_keys(paths)
    ids, id_notes = image_ids(paths, stems)
    row = annotations.rows_of(stems)
    boxes, frames = annotations.boxes.take(row), frames_of(original_px(uri), stems)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: stems,
        schema.SPLIT: split_by_patient(stems, row.is_null().to_numpy(zero_copy_only=False)),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(annotations.labels_of(stems)),
        schema.BOXES: boxes,
        schema.BOXES_FRAME: frames,
        schema.EXTRA: _extra(annotations).take(row),
    }
    notes = [
        *notes,
        *annotations.notes,
        *id_notes,
        *listing_notes(ANNOTATIONS_FILE, len(annotations.images), row, "findings are unknown"),
        *size_notes(paths, boxes, frames),
    ]
    return Manifest(manifest_table(columns), schema.VINBIGDATA_FINDINGS, notes)


def listed(uri: str) -> set[str]:
    """The images listed in train.csv; none if the archive has another layout."""
    return set(read(storage.join(uri, ANNOTATIONS_FILE)).images.to_pylist()) if detect(uri) else set()


def original_px(uri: str) -> pa.Table:
    """[height, width] of the original by image, as far as known, as `annotations.read_frames` returns it.

    train.csv takes precedence.

    Raises:
        UserError: a size is invalid; the message names the file and the line.
    """
    locations = [storage.join(uri, file) for file in (*META_FILES, TEST_FILE, ANNOTATIONS_FILE)]
    has_sizes = [
        storage.exists(location) and (storage.name(location) in META_FILES or has_columns(location, (IMAGE, *FRAME)))
        for location in locations
    ]
    tables = [
        read_frames(location, (HEIGHT, WIDTH), FRAME)
        for location, has in zip(locations, has_sizes, strict=True)
        if has
    ]
    return joined_frames(reversed(tables))


def _extra(annotations: Read) -> pa.Array:
    """All readers, including those who marked nothing: {"readers": ["R8", "R9", "R10"]}."""
    readers = pc.binary_join(annotations.readers, "\0").dictionary_encode()
    lists = [text.split("\0") if text else [] for text in readers.dictionary.to_pylist()]
    objects = [json.dumps({rater_agreement.READERS: of_image}) for of_image in lists]
    return pa.array(objects, pa.string()).take(readers.indices)


def size_notes(paths: pa.Array, boxes: pa.Array, frames: pa.Array) -> Iterator[str]:
    """A note on copies whose original size is unknown."""
    boxed = pc.fill_null(pc.greater(pc.list_value_length(boxes), 0), False)
    is_dicom = pc.match_substring_regex(paths, rf"(?i)({'|'.join(map(re.escape, DICOM))})$")
    unsized = pc.sum(pc.and_(pc.and_(boxed, frames.is_null()), pc.invert(is_dicom))).as_py()
    if unsized:
        yield (
            f"boxes read as pixels of the files, because no table such as {META_FILES[0]} gives the originals' sizes"
            f": {counted(unsized, 'image')} other than DICOM"
        )
