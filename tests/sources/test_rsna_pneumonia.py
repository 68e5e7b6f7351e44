"""RSNA Pneumonia: boxes, classes, images without labels, and the mapping that names patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import find_source, open_manifest, rsna_pneumonia
from cxr.sources.options import ReadOptions
from tests.sources.archives import read, write

LABELS = """patientId,x,y,width,height,Target
a,264.0,152.0,213.0,379.0,1
a,562.0,152.0,256.0,453.0,1
a,562.0,152.0,256.0,453.0,1
b,,,,,0
c,,,,,0
"""
CLASSES = "patientId,class\na,Lung Opacity\na,Lung Opacity\nb,Normal\nc,No Lung Opacity / Not Normal\n"
MAPPING = [
    {"subset_img_id": "a", "img_id": "00000013_005.png", "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3"},
    {"subset_img_id": "b", "img_id": "00000013_006.png"},
    {"subset_img_id": "t", "img_id": "00000014_000.png"},
]
IMAGES = [f"stage_2_train_images/{image}.dcm" for image in "abc"] + ["stage_2_test_images/t.dcm"]


def lists(labels: str = LABELS, classes: str = CLASSES, mapping: Any = MAPPING) -> dict[str, str]:
    files = {rsna_pneumonia.LABELS_FILE: labels, rsna_pneumonia.CLASSES_FILE: classes}
    return files | ({rsna_pneumonia.MAPPING_FILE: json.dumps(mapping)} if mapping else {})


def test_labels_boxes_classes_and_patients(tmp_path: Path) -> None:
    archive = write(tmp_path, lists(), IMAGES)
    assert find_source(archive).name == "rsna-pneumonia"
    manifest, rows = read(archive)
    assert (manifest.findings, manifest.boxes_frame_px) == (("Pneumonia",), 1024)
    assert {image: row[schema.LABELS] for image, row in rows.items()} == {"a": [1], "b": [0], "c": [0], "t": [-1]}
    assert [
        [box[corner] for corner in ("label", "reader", "x_min", "x_max", "y_max")] for box in rows["a"][schema.BOXES]
    ] == [
        ["Pneumonia", None, 264, 477, 531],
        ["Pneumonia", None, 562, 818, 605],
    ]
    assert (rows["b"][schema.BOXES], rows["t"][schema.BOXES]) == ([], None)
    assert [rows[image][schema.PATIENT_ID] for image in "abct"] == ["13", "13", "c", "14"]
    assert (rows["a"][schema.STUDY_ID], rows["a"][schema.SERIES_ID], rows["b"][schema.STUDY_ID]) == (
        "1.2",
        "1.2.3",
        None,
    )
    assert json.loads(rows["a"][schema.EXTRA]) == {"class": "Lung Opacity", "img_id": "00000013_005.png"}
    assert json.loads(rows["c"][schema.EXTRA]) == {"class": "No Lung Opacity / Not Normal"}
    assert rows["a"][schema.SPLIT] == rows["b"][schema.SPLIT]
    assert rows["t"][schema.SPLIT] == "test"
    assert "not listed in stage_2_train_labels.csv, so pneumonia is unknown: 1 image" in manifest.notes


def test_a_patient_with_an_image_in_the_test_folder_is_a_test_patient(tmp_path: Path) -> None:
    mapping = [*MAPPING[:2], {"subset_img_id": "t", "img_id": "00000013_000.png"}]
    _, rows = read(write(tmp_path, lists(mapping=mapping), IMAGES))
    assert [rows[image][schema.SPLIT] for image in "abt"] == ["test"] * 3


def test_without_the_mapping_each_image_is_a_patient_and_a_note_says_so(tmp_path: Path) -> None:
    manifest, rows = read(write(tmp_path, lists(mapping=None), IMAGES))
    assert {image: row[schema.PATIENT_ID] for image, row in rows.items()} == {image: image for image in "abct"}
    assert any("the images of a person may be in several splits" in note for note in manifest.notes)


def test_odd_rows(tmp_path: Path) -> None:
    labels = LABELS + "b,1,2,3,4,1\nd,,,,,1\nmissing,,,,,0\ne,1,2,3,4,0\n"
    classes = CLASSES + "c,Normal\n"
    manifest, rows = read(write(tmp_path, lists(labels, classes), [*IMAGES, "d.png", "e.png"]))
    assert {image: (rows[image][schema.LABELS], rows[image][schema.BOXES]) for image in "bde"} == {
        "b": ([-1], None),
        "d": ([1], None),
        "e": ([-1], None),
    }
    assert rows["c"][schema.EXTRA] is None
    assert manifest.notes[1:] == [
        "missing from the archive: 1 of 6 images listed in stage_2_train_labels.csv; continuing with 6 images",
        "not listed in stage_2_train_labels.csv, so pneumonia is unknown: 1 image",
        "contradictory rows in stage_2_train_labels.csv: 2 images; the values that differ are unknown",
        "contradictory rows in stage_2_detailed_class_info.csv: 1 image; the values that differ are unknown",
    ]


@pytest.mark.parametrize(
    ("files", "trouble"),
    [
        ({}, "expected stage_2_train_labels.csv in .*, got none: add it"),
        (lists(LABELS.replace(",Target", ",t")), "stage_2_train_labels.csv, line 1: expected the columns patientId"),
        (lists(LABELS.replace("379.0,1", "379.0,2")), "line 2: expected a Target of 0 or 1, got '2'"),
        (lists(LABELS.replace("562.0", "left", 1)), "line 3: expected x, y, width, height as numbers, got 'left, "),
        (lists(LABELS.replace("264.0", "left")), "line 2: expected x, y, width, height as numbers, got 'left, "),
        (lists(mapping=[1]), "mappings_2018.json: expected a JSON list of objects with subset_img_id and img_id"),
        (lists(mapping={"a": 1}), "mappings_2018.json: expected a JSON list"),
    ],
)
def test_user_errors_name_the_file_and_the_line(tmp_path: Path, files: dict[str, str], trouble: str) -> None:
    with pytest.raises(UserError, match=trouble):
        open_manifest(write(tmp_path, files, IMAGES), ReadOptions(source="rsna-pneumonia"))
