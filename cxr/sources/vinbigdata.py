"""VinBigData Chest X-ray Abnormalities Detection (VinDr-CXR, Nguyen et al. 2022), as DICOM or as a PNG or JPEG copy.

    train.csv                       image_id, class_name, class_id, rad_id, x_min, y_min, x_max, y_max
    train/IMAGE_ID.dicom            or .png, .jpg; anywhere below the archive's root
    test/IMAGE_ID.dicom             of which no file tells anything
    train_meta.csv, test_meta.csv   image_id, dim0, dim1: the original's height and width, where images are copies

Three radiologists of seventeen read each image of train.csv. All their boxes stay in the manifest, each with its
reader; they are pixels of the original, whose size goes along where train_meta.csv tells it, so that copies of any
size can be read. An image in which all found nothing has no boxes, which is not null.

Patients are not told: each image has one of its own. Its split is a hash of its id; images that train.csv does not
name are for testing, but so are some that it does, for else nothing there could be judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import readers
from cxr.sources.annotations import HEADER, IMAGE, Read, read
from cxr.sources.base import Manifest, labels_column, manifest_table
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.listing import PATH, image_ids, image_key, list_images
from cxr.sources.splits import split_by_patient

name = "vinbigdata"

ANNOTATIONS_FILE = "train.csv"
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
        schema.LABELS: labels_column(readers.labels(boxes, schema.VINBIGDATA_FINDINGS)),
        schema.BOXES: pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type),
        schema.BOXES_FRAME: pa.array(
            [frames.get(each) for each in stems], schema.MANIFEST.field(schema.BOXES_FRAME).type
        ),
        schema.EXTRA: pa.array([_extra(told, each) for each in stems], pa.string()),
    }
    notes = [*notes, *told.notes, *id_notes, *_presence_notes(told, stems), *_size_notes(paths, stems, boxes, frames)]
    return Manifest(manifest_table(columns), schema.VINBIGDATA_FINDINGS, notes)


def original_px(uri: str) -> dict[str, list[int]]:
    """[height, width] of the original by image id, as far as a file of the archive tells."""
    sizes: dict[str, list[int]] = {}
    for location in (storage.join(uri, file) for file in META_FILES):
        if storage.exists(location):
            table = read_csv(location, (IMAGE, HEIGHT, WIDTH))
            columns = [table.column(name) for name in (IMAGE, HEIGHT, WIDTH)]
            for row, (image, *size) in enumerate(zip(*columns, strict=True)):
                try:
                    sizes[image_key(image)] = [int(side) for side in size]
                except ValueError:
                    raise table.error(row, "a height and a width in pixels", ", ".join(size)) from None
    return sizes


def _extra(told: Read, image: str) -> str | None:
    """Who looked, those who found nothing included: {"readers": ["R8", "R9", "R10"]}."""
    return json.dumps({"readers": told.readers[image]}) if image in told.readers else None


def _presence_notes(told: Read, stems: Sequence[str]) -> Iterator[str]:
    """Words on listed images that are not here, and on images that are not listed."""
    if missing := len(told.boxes.keys() - set(stems)):
        lost = f"{missing:,} of the {len(told.boxes):,} images that {ANNOTATIONS_FILE} lists"
        yield f"{lost} are not here; going on with {len(stems):,}"
    if untold := sum(each not in told.boxes for each in stems):
        yield f"{untold:,} images are not listed in {ANNOTATIONS_FILE}: what they show is unknown"


def _size_notes(paths: pa.Array, stems: Sequence[str], boxes: Sequence[Any], frames: dict[str, Any]) -> Iterator[str]:
    """Words on copies of unknown scale."""
    drawn = zip(paths.to_pylist(), stems, boxes, strict=True)
    unsized = sum(bool(box) and each not in frames and not path.lower().endswith(DICOM) for path, each, box in drawn)
    if unsized:
        where = f"of {unsized:,} images that are no DICOM no {META_FILES[0]} tells the original's size"
        yield f"{where}: their boxes are taken for pixels of the files"
