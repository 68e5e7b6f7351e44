"""RSNA Pneumonia Detection Challenge, stage 2 (Shih et al. 2019): 30,000 images of ChestX-ray14, read again.

    stage_2_train_labels.csv           patientId, x, y, width, height, Target: one row per box, or one without a box
    stage_2_detailed_class_info.csv    patientId, class: Lung Opacity, Normal, or No Lung Opacity / Not Normal
    stage_2_train_images/*.dcm, stage_2_test_images/*.dcm    1024 x 1024 pixels, to which the boxes refer
    pneumonia-challenge-dataset-mappings_2018.json           from the RSNA's page: the images' names in ChestX-ray14

`patientId` identifies an image, although it is also the DICOM files' PatientID. Only the mapping shows which
images show the same person; without it each image counts as a patient of its own, and a note says that a person's
images may be in several splits. With it, patients have the numbers that they have in `sources.chestxray14`.

The finding is Pneumonia, as in the challenge's name: lung opacities that may be pneumonia. The list of classes calls
them Lung Opacity. An image without such an opacity has no box and may show other diseases; its class is in
`schema.EXTRA`.

Images that are not listed, which are those of stage_2_test_images, have unknown labels and are in the test split.
Some of the others are too, by a hash of the patient, because otherwise that split would have no ground truth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.csv_table import CsvTable, has_columns, read_csv
from cxr.sources.image_files import PATH, image_ids, image_key, image_keys, list_images
from cxr.sources.label_rows import ImageKeys, contradictions_note, merged_row, presence_notes, rows_by_image
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient

name = "rsna-pneumonia"

FINDING = "Pneumonia"  # also the label of the boxes
LABELS_FILE, CLASSES_FILE = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MAPPING_FILE = "pneumonia-challenge-dataset-mappings_2018.json"
IMAGE, TARGET, CLASS = "patientId", "Target", "class"
BOX = ("x", "y", "width", "height")
FRAME_PX = 1024

# Keys of an object in the mapping.
MAPPED_IMAGE, NIH_IMAGE = "subset_img_id", "img_id"
STUDY_UID, SERIES_UID = "StudyInstanceUID", "SeriesInstanceUID"

_TARGETS = {"1": schema.POSITIVE, "1.0": schema.POSITIVE, "0": schema.NEGATIVE, "0.0": schema.NEGATIVE}

Box = dict[str, Any]  # an item of schema.BOX_TYPE


def detect(uri: str) -> bool:
    location = storage.join(uri, LABELS_FILE)
    return storage.exists(location) and has_columns(location, (IMAGE, TARGET))


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the lists by its name; notes count missing and unlisted images.

    Raises:
        UserError: the list of labels is missing or damaged, or there are no images.
    """
    location = storage.join(uri, LABELS_FILE)
    if not storage.exists(location):
        raise UserError(f"expected {LABELS_FILE} in {uri}, got none: add it, or use --source folder")
    labels, boxes, label_notes = read_labels(read_csv(location, (IMAGE, *BOX, TARGET)))
    classes, class_notes = _classes(storage.join(uri, CLASSES_FILE))
    mapping, mapping_notes = _mapping(storage.join(uri, MAPPING_FILE))
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    keys = [image_key(path) for path in paths.to_pylist()]
    ids, id_notes = image_ids(paths, pa.array(keys, pa.string()))
    of_image = [mapping.get(key, {}) for key in keys]
    extras = [_extra(classes.get(key), each.get(NIH_IMAGE)) for key, each in zip(keys, of_image, strict=True)]
    patients = _patients([each.get(NIH_IMAGE) for each in of_image], keys)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: patients,
        schema.STUDY_ID: pa.array([each.get(STUDY_UID) for each in of_image], pa.string()),
        schema.SERIES_ID: pa.array([each.get(SERIES_UID) for each in of_image], pa.string()),
        schema.SPLIT: split_by_patient(patients, np.array([key not in labels for key in keys])),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.array([[labels.get(key, schema.UNKNOWN)] for key in keys], np.int8)),
        schema.BOXES: pa.array([boxes.get(key) for key in keys], schema.MANIFEST.field(schema.BOXES).type),
        schema.EXTRA: pa.array(extras, pa.string()),
    }
    missing, unlisted = len(labels.keys() - set(keys)), sum(key not in labels for key in keys)
    notes += presence_notes(LABELS_FILE, len(labels), missing, len(keys), unlisted, "pneumonia is unknown")
    notes += [*id_notes, *label_notes, *class_notes, *mapping_notes]
    return Manifest(manifest_table(columns, FRAME_PX), (FINDING,), notes)


def read_labels(
    table: CsvTable, keys_of: ImageKeys = image_keys
) -> tuple[dict[str, int], dict[str, list[Box] | None], list[str]]:
    """Labels and boxes by the images' keys, and notes. Repeated rows count once.

    An image whose rows contradict each other has an unknown label and null boxes. A positive image without a box has
    null boxes, which are unknown; a negative one has an empty list.
    """
    targets, places = table.column(TARGET), list(zip(*map(table.column, BOX), strict=True))
    labels: dict[str, int] = {}
    boxes: dict[str, list[Box] | None] = {}
    contradictory = 0
    for image, rows in rows_by_image(table, IMAGE, keys_of).items():
        for row in rows:
            if targets[row] not in _TARGETS:
                raise table.error(row, f"a {TARGET} of 0 or 1", targets[row])
        first_rows: dict[tuple[str, ...], int] = {}  # the first row of each place
        for row in rows:
            if any(places[row]):
                first_rows.setdefault(places[row], row)
        of_image = {_TARGETS[targets[row]] for row in rows}
        if len(of_image) > 1 or (first_rows and schema.NEGATIVE in of_image):
            contradictory += 1
            labels[image], boxes[image] = schema.UNKNOWN, None
            continue
        (labels[image],) = of_image
        made = [_box(table, row, place) for place, row in first_rows.items()]
        boxes[image] = made if made or labels[image] == schema.NEGATIVE else None
    return labels, boxes, contradictions_note(contradictory, storage.name(table.location))


def _box(table: CsvTable, row: int, place: Sequence[str]) -> Box:
    try:
        x, y, width, height = map(float, place)
    except ValueError:
        raise table.error(row, f"{', '.join(BOX)} as numbers", ", ".join(place)) from None
    corners = {schema.X_MIN: x, schema.Y_MIN: y, schema.X_MAX: x + width, schema.Y_MAX: y + height}
    return {schema.LABEL: FINDING, schema.READER: None, **corners}


def _classes(location: str) -> tuple[dict[str, str], list[str]]:
    """The class of each image, as published, blank where its rows differ; and notes."""
    if not storage.exists(location):
        return {}, []
    table = read_csv(location, (IMAGE, CLASS))
    values = table.column(CLASS)
    merged = {
        image: merged_row([[values[row]] for row in rows]) for image, rows in rows_by_image(table, IMAGE).items()
    }
    notes = contradictions_note(sum(differ for _, differ in merged.values()), CLASSES_FILE)
    return {image: value for image, ((value,), _) in merged.items()}, notes


def _mapping(location: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The mapping's texts by `image_key`, and a note if there is none."""
    if not storage.exists(location):
        alone = "each image counts as one patient, so the images of a person may be in several splits"
        return {}, [f"missing from the archive: {MAPPING_FILE}; {alone}"]
    wrong = UserError(
        f"{location}: expected a JSON list of objects with {MAPPED_IMAGE} and {NIH_IMAGE}: restore the file"
    )
    try:
        entries = json.loads(storage.read_bytes(location))
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(entries, list):
        raise wrong
    mapping: dict[str, dict[str, str]] = {}
    for entry in entries:
        keys = (MAPPED_IMAGE, NIH_IMAGE, STUDY_UID, SERIES_UID)
        texts = {key: entry.get(key) for key in keys} if isinstance(entry, dict) else {}
        texts = {key: text for key, text in texts.items() if isinstance(text, str) and text.isascii()}
        if MAPPED_IMAGE not in texts or NIH_IMAGE not in texts:
            raise wrong
        mapping[image_key(texts[MAPPED_IMAGE])] = texts
    return mapping, []


def _patients(nih_images: Sequence[str | None], keys: Sequence[str]) -> pa.Array:
    """The patient in a name such as 00000013_005.png, without leading zeros; else the image itself."""
    numbers = pc.extract_regex(pa.array(nih_images, pa.string()), r"^0*(?P<patient>\d+)_\d+")
    return pc.coalesce(pc.struct_field(numbers, "patient"), pa.array(keys, pa.string()))


def _extra(class_name: str | None, nih_image: str | None) -> str | None:
    values = {key: value for key, value in ((CLASS, class_name), (NIH_IMAGE, nih_image)) if value}
    return json.dumps(values) if values else None
