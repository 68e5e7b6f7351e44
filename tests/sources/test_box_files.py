"""Boxes in COCO JSON and in the RSNA challenge's columns; the content of a file tells its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import open_manifest
from cxr.sources.box_files import read_boxes
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling

CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
RSNA_HEADER = "patientId,x,y,width,height,Target\n"


@pytest.fixture
def archive(tmp_path: Path) -> str:
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("a.png", "b.dcm", "c.jpg"):
        (folder / name).write_bytes(b"?")
    return str(folder)


def coco(**changes: Any) -> dict[str, Any]:
    """Image a has a fracture and two devices, b has nothing, d is not in the archive."""
    names = ("Fracture", "No finding", "Device")
    boxes = ((7, 1, [10, 20, 30, 40]), (7, 3, [0, 0, 5.5, 5]), (7, 3, [50, 60, 1, 2]), (9, 2, [0, 0, 1, 1]))
    return {
        "info": {},
        "images": [
            {"id": 7, "file_name": "train/a.png", "height": 200, "width": 100},
            {"id": 8, "file_name": "b.png", "height": 300, "width": 400},
            {"id": 9, "file_name": "d.png"},
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [{"image_id": image, "category_id": which, "bbox": box} for image, which, box in boxes],
    } | changes


def opened(archive: str, tmp_path: Path, text: str) -> Manifest:
    (tmp_path / "boxes").write_text(text)  # without a suffix: the content decides
    return open_manifest(archive, labeling=Labeling(boxes=str(tmp_path / "boxes")))


def test_coco_boxes_labels_and_frames(archive: str, tmp_path: Path) -> None:
    manifest = opened(archive, tmp_path, json.dumps(coco()))
    a, b = manifest.table.to_pylist()
    assert manifest.findings == ("Fracture", "Device")
    assert [(box["label"], *(box[corner] for corner in CORNERS)) for box in a[schema.BOXES]] == [
        ("Fracture", 10, 20, 40, 60),
        ("Device", 0, 0, 5.5, 5),
        ("Device", 50, 60, 51, 62),
    ]
    assert (a[schema.LABELS], a[schema.BOXES_FRAME]) == ([1, 1], [200, 100])
    assert (b[schema.LABELS], b[schema.BOXES], b[schema.BOXES_FRAME]) == ([0, 0], [], [300, 400])
    assert "boxes listed for these images: 3 (Fracture 1, Device 2); images without any: 1" in manifest.notes
    assert "not listed in boxes, skipped: 1 of 3 images, such as 'c'" in manifest.notes
    assert "missing from the archive: 1 of 3 images listed in boxes, such as 'd'" in manifest.notes


def test_json_in_other_encodings_is_recognized(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / encoding).write_text(" \n" + json.dumps(coco()), encoding=encoding)
        assert read_boxes(str(tmp_path / encoding)).findings == ("Fracture", "Device")


def test_rsna_rows_are_boxes_in_a_frame_of_1024(archive: str, tmp_path: Path) -> None:
    rows = "a,264.0,152.0,213.0,379.0,1\na,562,152,256,453,1\na,562,152,256,453,1\nb,,,,,0\n"
    manifest = opened(archive, tmp_path, RSNA_HEADER + rows)
    a, b = manifest.table.to_pylist()
    assert manifest.findings == ("Pneumonia",)
    assert [[box[corner] for corner in CORNERS] for box in a[schema.BOXES]] == [
        [264, 152, 477, 531],
        [562, 152, 818, 605],
    ]
    assert (a[schema.LABELS], a[schema.BOXES_FRAME]) == ([1], [1024, 1024])
    assert (b[schema.LABELS], b[schema.BOXES]) == ([0], [])


def test_contradictory_rsna_targets_are_unknown(archive: str, tmp_path: Path) -> None:
    manifest = opened(archive, tmp_path, RSNA_HEADER + "a,1,2,3,4,1\na,,,,,0\n")
    assert manifest.table[schema.LABELS].to_pylist() == [[schema.UNKNOWN]]
    assert "contradictory rows in boxes: 1 image; the values that differ are unknown" in manifest.notes


def annotation(**changes: Any) -> str:
    return json.dumps(coco(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]} | changes]))


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("{", r"boxes: expected COCO JSON, got an error at line 1: repair the file"),
        ("[]", "its content: expected an object with the lists images, categories, annotations, got 'list'"),
        ('{"images": []}', "its content: expected an object with the lists .* got 'images'"),
        (json.dumps(coco(images=[3])), r"images\[0\]: expected an object, got 3"),
        (json.dumps(coco(images=[{"id": 7}])), r"images\[0\]: expected a file_name, got None"),
        (
            json.dumps(coco(images=[{"id": 7, "file_name": "a", "height": 0, "width": 5}])),
            r"images\[0\]: expected height and width from 1 to 65,535 pixels, got \[0, 5\]",
        ),
        (
            json.dumps(coco(images=[{"id": n, "file_name": "a", "height": n, "width": 5} for n in (7, 8)])),
            r"images\[1\]: expected the size of the other entry of 'a', got \[8, 5\]",
        ),
        (json.dumps(coco(categories=[{"id": 1}])), r"categories\[0\]: expected a name, got None"),
        (annotation(image_id=70), r"annotations\[0\]: expected an image_id that is listed in images, got 70"),
        (annotation(image_id=None), r"annotations\[0\]: expected a number or text as image_id, got None"),
        (annotation(category_id=5), r"annotations\[0\]: expected a category_id that is listed in categories, got 5"),
        (annotation(bbox=[1, 2, 3]), r"annotations\[0\]: expected a bbox of four numbers, .* got \[1, 2, 3\]"),
        (annotation(bbox=[1, 2, 3, "4"]), r"annotations\[0\]: expected a bbox of four numbers"),
        (RSNA_HEADER + "a,1,2,3,4,2\n", "line 2: expected a Target of 0 or 1, got '2'"),
        (RSNA_HEADER + "a,1,2,x,4,1\n", "line 2: expected x, y, width, height as numbers, got '1, 2, x, 4'"),
        ("name,box\na,1\n", "expected boxes as COCO JSON or as CSV with the columns image_id, .* got neither"),
        (RSNA_HEADER + "d,,,,,0\n", "the archive has 'a', 'b', 'c', the list 'd': use the list of these images"),
    ],
)
def test_mistakes_name_the_entry(text: str, trouble: str, archive: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=trouble):
        opened(archive, tmp_path, text)


PATIENTS = ("p1/s1/view1.png", "p2/s1/view1.png")


@pytest.fixture
def patients(tmp_path: Path) -> str:
    """An archive in which two patients have images of the same name."""
    for path in PATIENTS:
        (tmp_path / "patients" / path).parent.mkdir(parents=True)
        (tmp_path / "patients" / path).write_bytes(b"?")
    return str(tmp_path / "patients")


OF_PATIENTS = {
    "COCO": json.dumps(
        {
            "images": [{"id": at, "file_name": f"copy/{path}"} for at, path in enumerate(PATIENTS)],
            "categories": [{"id": 0, "name": "Pneumonia"}],
            "annotations": [{"image_id": at, "category_id": 0, "bbox": [at, 0, 8, 8]} for at in range(2)],
        }
    ),
    "VinBigData": "image_id,class_name,x_min,y_min,x_max,y_max,height,width\n"
    + "".join(f"{path},Pneumonia,{at},0,8,8,{64 + at},64\n" for at, path in enumerate(PATIENTS)),
    "RSNA": RSNA_HEADER + "".join(f"{path},{at},0,8,8,1\n" for at, path in enumerate(PATIENTS)),
}


@pytest.mark.parametrize("text", OF_PATIENTS.values(), ids=OF_PATIENTS)
def test_images_with_the_same_name_get_their_own_boxes(text: str, patients: str, tmp_path: Path) -> None:
    manifest = opened(patients, tmp_path, text)
    assert manifest.table[schema.IMAGE_ID].to_pylist() == [*PATIENTS]
    assert [[box[schema.X_MIN] for box in boxes] for boxes in manifest.table[schema.BOXES].to_pylist()] == [[0], [1]]
    if text is OF_PATIENTS["VinBigData"]:
        assert manifest.table[schema.BOXES_FRAME].to_pylist() == [[64, 64], [65, 64]]


def test_a_name_of_several_images_is_not_enough(patients: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use the images' paths in it, because file names are not unique"):
        opened(patients, tmp_path, RSNA_HEADER + "view1,1,2,3,4,1\n")
    manifest = opened(patients, tmp_path, RSNA_HEADER + "view1,1,2,3,4,1\np2/s1/view1,,,,,0\n")
    assert manifest.table[schema.BOXES].to_pylist() == [[]]
    assert (
        "not listed in boxes, skipped: 1 of 2 images, such as 'p1/s1/view1'; with a file name that others share: "
        "1 (use their paths in boxes)"
    ) in manifest.notes


def test_a_list_without_entries_is_a_mistake(archive: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got an empty list"):
        opened(archive, tmp_path, "image_id,class_name,x_min,y_min,x_max,y_max\n")


def test_a_table_of_labels_takes_precedence_and_boxes_add_places(archive: str, tmp_path: Path) -> None:
    """Images that the file of boxes does not list have unknown boxes."""
    (tmp_path / "boxes").write_text(json.dumps(coco()))
    (tmp_path / "labels.csv").write_text("image,Fracture,Nodule\na,0,1\nb,1,0\nc,1,1\n")
    labeling = Labeling(boxes=str(tmp_path / "boxes"), labels=str(tmp_path / "labels.csv"))
    manifest = open_manifest(archive, labeling=labeling)
    assert manifest.findings == ("Fracture", "Nodule")
    assert manifest.table[schema.LABELS].to_pylist() == [[0, 1], [1, 0], [1, 1]]
    boxes = manifest.table[schema.BOXES].to_pylist()
    assert [None if each is None else len(each) for each in boxes] == [3, 0, None]
