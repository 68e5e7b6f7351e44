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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement
from cxr.sources.annotations import FRAME, HEADER, IMAGE, Read, read, read_frames
from cxr.sources.csv_table import has_columns
from cxr.sources.image_files import PATH, image_ids, image_key, list_images
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
    stems = [image_key(path) for path in paths.to_pylist()]
    ids, id_notes = image_ids(paths, pa.array(stems, pa.string()))
    boxes = [annotations.boxes.get(each) for each in stems]
    frames = original_px(uri)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: pa.array(stems, pa.string()),
        schema.SPLIT: split_by_patient(pa.array(stems, pa.string()), np.array([each is None for each in boxes])),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(annotations.labels(stems)),
        schema.BOXES: pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type),
        schema.BOXES_FRAME: pa.array(
            [frames.get(each) for each in stems], schema.MANIFEST.field(schema.BOXES_FRAME).type
        ),
        schema.EXTRA: pa.array([_extra(annotations, each) for each in stems], pa.string()),
    }
    notes = [
        *notes,
        *annotations.notes,
        *id_notes,
        *_presence_notes(annotations, stems),
        *size_notes(paths.to_pylist(), stems, boxes, frames),
    ]
    return Manifest(manifest_table(columns), schema.VINBIGDATA_FINDINGS, notes)


def listed(uri: str) -> set[str]:
    """The images listed in train.csv; none if the archive has another layout."""
    return set(read(storage.join(uri, ANNOTATIONS_FILE)).boxes) if detect(uri) else set()


def original_px(uri: str) -> dict[str, list[int]]:
    """[height, width] of the original by image, as far as known; train.csv takes precedence.

    Raises:
        UserError: a size is invalid; the message names the file and the line.
    """
    sizes: dict[str, list[int]] = {}
    for file in (*META_FILES, TEST_FILE, ANNOTATIONS_FILE):
        location = storage.join(uri, file)
        if storage.exists(location) and (file in META_FILES or has_columns(location, (IMAGE, *FRAME))):
            sizes |= read_frames(location, (HEIGHT, WIDTH), FRAME)
    return sizes


def _extra(annotations: Read, image: str) -> str | None:
    """All readers, including those who marked nothing: {"readers": ["R8", "R9", "R10"]}."""
    return json.dumps({rater_agreement.READERS: annotations.readers[image]}) if image in annotations.readers else None


def _presence_notes(annotations: Read, stems: Sequence[str]) -> Iterator[str]:
    """Notes on listed images without a file and on images that are not listed."""
    if missing := len(annotations.boxes.keys() - set(stems)):
        lost = f"missing from the archive: {missing:,} of {counted(len(annotations.boxes), 'image')} listed in"
        yield f"{lost} {ANNOTATIONS_FILE}; continuing with {counted(len(stems), 'image')}"
    if unlisted := sum(each not in annotations.boxes for each in stems):
        yield f"not listed in {ANNOTATIONS_FILE}, so findings are unknown: {counted(unlisted, 'image')}"


def size_notes(
    paths: Sequence[str], names: Sequence[str], boxes: Sequence[Any], frames: Mapping[str, Any]
) -> Iterator[str]:
    """A note on copies whose original size is unknown."""
    images = zip(paths, names, boxes, strict=True)
    unsized = sum(bool(box) and each not in frames and not path.lower().endswith(DICOM) for path, each, box in images)
    if unsized:
        yield (
            f"boxes read as pixels of the files, because no table such as {META_FILES[0]} gives the originals' sizes"
            f": {counted(unsized, 'image')} other than DICOM"
        )
