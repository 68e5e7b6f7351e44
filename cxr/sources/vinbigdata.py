"""VinBigData Chest X-ray Abnormalities Detection (VinDr-CXR, Nguyen et al. 2022), as DICOM or as a PNG or JPEG copy.

    train.csv                       image_id, class_name, class_id, rad_id, x_min, y_min, x_max, y_max
    train/IMAGE_ID.dicom            or .png, .jpg; anywhere below the archive's root
    test/IMAGE_ID.dicom             of which no file tells anything
    train_meta.csv, test_meta.csv   image_id, dim0, dim1: the original's height and width, where images are copies

Three radiologists of seventeen read each image of train.csv. All their boxes stay in the manifest, each with its
reader; they are pixels of the original. Copies of any size can be read where that size is known: from
train_meta.csv or, as in some copies, from the columns width and height of train.csv and test.csv. An image in which
all found nothing has no boxes, which is not null.

Patients are not told: each image has one of its own. Its split is a hash of its id; images that train.csv does not
name are for testing, but so are some that it does, for else nothing there could be judged.
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

name = "vinbigdata"

ANNOTATIONS_FILE = "train.csv"
TEST_FILE = "test.csv"  # of some copies: image_id, width, height
META_FILES = ("train_meta.csv", "test_meta.csv")
HEIGHT, WIDTH = "dim0", "dim1"  # of the original, pixels
TRAIN, TEST = "train", "test"  # folders
DICOM = (".dicom", ".dcm")


def detect(uri: str) -> bool:
    location = storage.join(uri, ANNOTATIONS_FILE)
    return storage.exists(location) and has_columns(location, HEADER[:4])


def manifest(uri: str) -> Manifest:
    """Every image file once, with what train.csv says of it; notes count what is only here or only there.

    Raises:
        UserError: train.csv is missing or broken, or there is no image.
    """
    location = storage.join(uri, ANNOTATIONS_FILE)
    if not storage.exists(location):
        raise UserError(f"{uri} has no {ANNOTATIONS_FILE}: put it there, or choose the source folder")
    told = read(location)
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    stems = [image_key(path) for path in paths.to_pylist()]
    ids, id_notes = image_ids(paths, pa.array(stems, pa.string()))
    boxes = [told.boxes.get(each) for each in stems]
    frames = original_px(uri)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: pa.array(stems, pa.string()),
        schema.SPLIT: split_by_patient(pa.array(stems, pa.string()), np.array([each is None for each in boxes])),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(told.labels(stems)),
        schema.BOXES: pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type),
        schema.BOXES_FRAME: pa.array(
            [frames.get(each) for each in stems], schema.MANIFEST.field(schema.BOXES_FRAME).type
        ),
        schema.EXTRA: pa.array([_extra(told, each) for each in stems], pa.string()),
    }
    notes = [
        *notes,
        *told.notes,
        *id_notes,
        *_presence_notes(told, stems),
        *size_notes(paths.to_pylist(), stems, boxes, frames),
    ]
    return Manifest(manifest_table(columns), schema.VINBIGDATA_FINDINGS, notes)


def listed(uri: str) -> set[str]:
    """The images that train.csv lists; none where the archive has no such file."""
    return set(read(storage.join(uri, ANNOTATIONS_FILE)).boxes) if detect(uri) else set()


def original_px(uri: str) -> dict[str, list[int]]:
    """[height, width] of the original by image, as far as a file of the archive tells; train.csv's word counts most.

    Raises:
        UserError: a size that no image has; the message names the file and the row.
    """
    sizes: dict[str, list[int]] = {}
    for file in (*META_FILES, TEST_FILE, ANNOTATIONS_FILE):
        location = storage.join(uri, file)
        if storage.exists(location) and (file in META_FILES or has_columns(location, (IMAGE, *FRAME))):
            sizes |= read_frames(location, (HEIGHT, WIDTH), FRAME)
    return sizes


def _extra(told: Read, image: str) -> str | None:
    """Who looked, those who found nothing included: {"readers": ["R8", "R9", "R10"]}."""
    return json.dumps({rater_agreement.READERS: told.readers[image]}) if image in told.readers else None


def _presence_notes(told: Read, stems: Sequence[str]) -> Iterator[str]:
    """Words on listed images that are not here, and on images that are not listed."""
    if missing := len(told.boxes.keys() - set(stems)):
        lost = f"{missing:,} of the {len(told.boxes):,} images that {ANNOTATIONS_FILE} lists"
        yield f"{lost} are not here; going on with {len(stems):,}"
    if untold := sum(each not in told.boxes for each in stems):
        yield f"{untold:,} images are not listed in {ANNOTATIONS_FILE}: what they show is unknown"


def size_notes(
    paths: Sequence[str], names: Sequence[str], boxes: Sequence[Any], frames: Mapping[str, Any]
) -> Iterator[str]:
    """Notes on copies of unknown scale."""
    drawn = zip(paths, names, boxes, strict=True)
    unsized = sum(bool(box) and each not in frames and not path.lower().endswith(DICOM) for path, each, box in drawn)
    if unsized:
        where = f"of {unsized:,} images that are no DICOM, no file tells the original's size ({META_FILES[0]} would)"
        yield f"{where}: their boxes are taken for pixels of the files"
