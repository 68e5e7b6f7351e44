"""VinDr-CXR as published on PhysioNet: boxes, normal images, readers, image labels, official splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import find_source, open_manifest
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling, ReadOptions

DRAWN = """image_id,rad_id,class_name,x_min,y_min,x_max,y_max
a,R1,Cardiomegaly,10,20,30,40
a,R2,cardiomegaly,11,20,30,40
a,R2,Rib fracture,1,2,3,4
a,R3,No finding,,,,
b,R1,No finding,,,,
b,R2,No finding,,,,
"""
DRAWN_IN_TEST = "image_id,class_name,x_min,y_min,x_max,y_max\nt,Nodule/Mass,5,5,9,9\nu,No finding,,,,\n"
IN_TRAIN = """image_id,rad_id,Cardiomegaly,Edema,Rib fracture,COPD,Tuberculosis,Other diseases,No finding
a,R1,1,0,0,1,,0,0
a,R2,1.0,0,1,1,,0,0
a,R3,0,0,0,0,,0,1
b,R1,0,0,0,0,,0,1
b,R2,,,,,,,1
"""
IN_TEST = "image_id,Cardiomegaly,Nodule/Mass,Edema,COPD,Other disease,No finding\nt,0,1,1,0,1,0\nu,0,0,0,0,0,1\n"


def write(folder: Path, files: dict[str, str], images: str = "train/a train/b train/c test/t test/u test/v") -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for image in images.split():
        path = folder / f"{image}.dicom"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> str:
    lists = {"annotations_train": DRAWN, "annotations_test": DRAWN_IN_TEST}
    lists |= {"image_labels_train": IN_TRAIN, "image_labels_test": IN_TEST}
    return str(write(tmp_path, {f"annotations/{name}.csv": text for name, text in lists.items()}))


def rows_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def shown(manifest: Manifest, image: str, label: int = 1) -> set[str]:
    labels = rows_of(manifest)[image][schema.LABELS]
    return {finding for finding, own in zip(manifest.findings, labels, strict=True) if own == label}


def test_boxes_readers_and_labels_of_images_are_read(archive: str) -> None:
    assert find_source(archive).name == "vindr-cxr"
    manifest = open_manifest(archive)
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.findings == (*schema.VINDR_LOCAL_FINDINGS, *schema.VINDR_GLOBAL_FINDINGS)
    assert manifest.findings[:14] == schema.VINBIGDATA_FINDINGS
    rows = rows_of(manifest)
    assert [(box["label"], box["reader"], box["x_min"]) for box in rows["a"][schema.BOXES]] == [
        ("Cardiomegaly", "R1", 10),
        ("Cardiomegaly", "R2", 11),
        ("Rib fracture", "R2", 1),
    ]
    assert [(box["label"], box["reader"]) for box in rows["t"][schema.BOXES]] == [("Nodule/Mass", None)]
    assert (rows["b"][schema.BOXES], rows["u"][schema.BOXES], rows["c"][schema.BOXES]) == ([], [], None)
    assert shown(manifest, "a") == {"Cardiomegaly", "Rib fracture", "COPD"}
    assert shown(manifest, "b", 0) == {*manifest.findings}, "a reader said 'No finding'"
    assert shown(manifest, "t") == {"Nodule/Mass", "Edema", "Other disease"}, "Edema has no box, but a label"
    assert shown(manifest, "c", -1) == shown(manifest, "v", -1) == {*manifest.findings}
    assert json.loads(rows["a"][schema.EXTRA])["readers"] == ["R1", "R2", "R3"]
    assert rows["t"][schema.EXTRA] is None
    assert "not in any list, so findings are unknown: 2 images" in manifest.notes


def test_splits_are_the_official_ones(archive: str) -> None:
    rows = rows_of(open_manifest(archive))
    assert {image for image, row in rows.items() if row[schema.SPLIT] == "test"} == {"t", "u", "v"}
    for number in range(20):
        write(Path(archive), {}, f"train/{number}")
    splits = {image: row[schema.SPLIT] for image, row in rows_of(open_manifest(archive)).items()}
    assert all((split == "test") == (image in "tuv") for image, split in splits.items())


def test_lists_in_the_root_and_missing_image_labels(tmp_path: Path) -> None:
    archive = str(write(tmp_path, {"annotations_train.csv": DRAWN}, "train/a train/b.png elsewhere/c"))
    manifest = open_manifest(archive)
    assert manifest.findings == schema.VINDR_LOCAL_FINDINGS
    assert shown(manifest, "a") == {"Cardiomegaly", "Rib fracture"}
    assert shown(manifest, "b", 0) == {*manifest.findings}
    assert {row[schema.SPLIT] for image, row in rows_of(manifest).items() if image != "c"} <= {"train", "val"}


def test_image_labels_without_boxes(tmp_path: Path) -> None:
    archive = str(write(tmp_path, {"annotations/image_labels_train.csv": IN_TRAIN}))
    manifest = open_manifest(archive)
    assert find_source(archive).name == "vindr-cxr"
    assert shown(manifest, "a") == {"Cardiomegaly", "Rib fracture", "COPD"}
    assert {row[schema.BOXES] for row in rows_of(manifest).values()} == {None}


def test_min_readers_counts_boxes_or_labels_and_a_consensus_is_unchanged(archive: str) -> None:
    manifest = open_manifest(archive, labeling=Labeling(min_readers=2))
    assert shown(manifest, "a") == {"Cardiomegaly", "COPD"}
    assert shown(manifest, "t") == {"Nodule/Mass", "Edema", "Other disease"}


def test_contradictory_labels_are_unknown_and_counted(tmp_path: Path) -> None:
    labels = "image_id,rad_id,Edema,COPD,No finding\na,R1,1,0,1\na,R1,1,0,1\nb,R1,1,0,0\nb,R1,0,0,0\nb,R2,,1,0\n"
    files = {
        "annotations_train.csv": "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n",
        "image_labels_train.csv": labels,
    }
    manifest = open_manifest(str(write(tmp_path, files)))
    assert "Edema" in shown(manifest, "a", -1) & shown(manifest, "b", -1)
    assert (shown(manifest, "a"), shown(manifest, "b")) == (set(), {"COPD"})
    told = "contradictory readings in image_labels_train.csv: 2; such labels are ignored"
    assert told in manifest.notes


@pytest.mark.parametrize(
    ("files", "trouble"),
    [
        ({"a.png": ""}, "expected annotations_train.csv or annotations_test.csv in"),
        ({"annotations_train.csv": DRAWN}, "expected X-rays in"),
        (
            {"annotations_train.csv": DRAWN, "a.png": "", "image_labels_train.csv": "image_id,Edema\na,yes\n"},
            "image_labels_train.csv, line 2: expected labels of 0, 1 or blank, got 'yes'",
        ),
    ],
)
def test_user_errors_name_the_file_and_the_line(tmp_path: Path, files: dict[str, str], trouble: str) -> None:
    with pytest.raises(UserError, match=trouble):
        open_manifest(str(write(tmp_path, files, "")), ReadOptions(source="vindr-cxr"))
