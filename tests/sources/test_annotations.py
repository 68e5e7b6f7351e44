"""Annotations given apart from the images: whose labels, which images, and what the user is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.judge.base import read_truth
from cxr.rows import make_rows
from cxr.schema import PixelFormat
from cxr.sources import Labelling, annotations, open_manifest
from tests.made_shards import write_shards

HEADER = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
OPACITY, CARDIOMEGALY = (schema.VINBIGDATA_FINDINGS.index(name) for name in ("Lung Opacity", "Cardiomegaly"))
ROWS = (
    "00000001_000,Lung Opacity,7,R1,10,20,30,40\n"
    "00000001_000.png,Cardiomegaly,3,R2,1.5,2,3,4\n"
    "00000001_000,Lung Opacity,7,R2,11,20,30,40\n"
    "00000002_000,No finding,14,R1,,,,\n"
    "00000009_000,No finding,14,R1,,,,\n"
)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    folder = tmp_path / "archive"
    (folder / "images").mkdir(parents=True)
    for name in ("00000001_000", "00000002_000", "00000003_000"):
        (folder / "images" / f"{name}.png").write_bytes(b"?")
    entries = "Image Index,Finding Labels,Patient ID,View Position\n00000001_000.png,Mass,1,PA\n"
    (folder / "Data_Entry_2017.csv").write_text(entries)
    (folder / "test_list.txt").write_text("00000002_000.png\n")
    return str(folder)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "boxes.csv").write_text(HEADER + ROWS)
    return str(tmp_path / "boxes.csv")


def test_labels_and_boxes_are_replaced_and_all_else_stays(archive: str, file: str) -> None:
    plain = {row[schema.IMAGE_ID]: row for row in open_manifest(archive).table.to_pylist()}
    manifest = open_manifest(archive, labelling=Labelling(file))
    assert manifest.findings == schema.VINBIGDATA_FINDINGS
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.boxes_frame_px == 1024
    ill, healthy = manifest.table.to_pylist()
    for row in (ill, healthy):
        for name in (schema.PATIENT_ID, schema.SPLIT, schema.SOURCE_URI, schema.VIEW, schema.EXTRA):
            assert row[name] == plain[row[schema.IMAGE_ID]][name]
    assert (healthy[schema.BOXES], healthy[schema.LABELS]) == ([], [0] * 14)
    assert [number for number, label in enumerate(ill[schema.LABELS]) if label == 1] == [CARDIOMEGALY, OPACITY]
    assert [(box["label"], box["reader"], box["x_min"], box["y_max"]) for box in ill[schema.BOXES]] == [
        ("Lung Opacity", "R1", 10, 40),
        ("Cardiomegaly", "R2", 1.5, 4),
        ("Lung Opacity", "R2", 11, 40),
    ]
    assert "labels and boxes of 2 of 3 images: boxes.csv" in manifest.notes
    assert "1 of the 3 images that boxes.csv names are not here" in manifest.notes


def test_so_many_readers_must_agree(archive: str, file: str) -> None:
    labels = open_manifest(archive, labelling=Labelling(file, readers_agree=2)).table[schema.LABELS].to_pylist()
    assert [number for number, label in enumerate(labels[0]) if label == 1] == [OPACITY]
    with pytest.raises(UserError, match="boxes are of no named readers"):
        open_manifest(archive, labelling=Labelling(readers_agree=2))
    with pytest.raises(UserError, match="readers_agree=0"):
        Labelling(readers_agree=0)


def test_nothing_asked_for_is_nothing_said() -> None:
    assert not Labelling()
    assert Labelling().describe() == {}
    assert Labelling("/a", 2).describe() == {"annotations": "/a", "readers_agree": 2}


def test_truth_of_a_report(archive: str, file: str, tmp_path: Path) -> None:
    known = read_truth(archive, "auto", "test", [schema.LABELS], Labelling(file))
    assert known.table[schema.IMAGE_ID].to_pylist() == ["00000002_000.png"]
    assert known.findings == schema.VINBIGDATA_FINDINGS
    stored = write_shards(tmp_path / "shards", {"train": 2, "test": 2})
    assert read_truth(stored, "auto", "test", [schema.LABELS], Labelling()).table.num_rows == 2
    with pytest.raises(UserError, match=r"is shards, which hold the labels .* leave --annotations out"):
        read_truth(stored, "auto", "test", [schema.LABELS], Labelling(file))


def test_boxes_without_area_are_left_out(archive: str, tmp_path: Path) -> None:
    (tmp_path / "flat.csv").write_text(f"{HEADER}00000001_000,ILD,5,R1,10,20,10,40\n")
    manifest = open_manifest(archive, labelling=Labelling(str(tmp_path / "flat.csv")))
    assert (manifest.table[schema.BOXES].to_pylist(), manifest.table[schema.LABELS][0].as_py()) == ([[]], [0] * 14)
    assert "1 boxes of flat.csv have no area: they are left out" in manifest.notes


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", "expected a header with the columns image_id, "),
        ("image_id,class_id\na,14\n", "without rad_id, x_min"),
        (f"{HEADER}a,No finding,14,R1,,,,\nb,what,15,R1,1,2,3,4\n", r"line 3: class_id '15', wanted 0 to 14"),
        (f"{HEADER}a,ILD,5,R1,1,,3,4\n", "line 2: could not convert"),
        (f"{HEADER}a,ILD,5,R1,1,nan,3,4\n", "line 2: corners 1, nan, 3, 4"),
        (f"{HEADER}a,ILD\n", "line 2: expected 8 fields as in the header, got 2"),
        (f"{HEADER}elsewhere,No finding,14,R1,,,,\n", "names none of the 3 images"),
    ],
)
def test_user_errors_say_what_was_wanted(archive: str, tmp_path: Path, text: str, trouble: str) -> None:
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=trouble):
        open_manifest(archive, labelling=Labelling(str(tmp_path / "odd.csv")))


def test_the_rsna_boxes_on_real_x_rays(real_data: Path) -> None:
    location = str(real_data / "rsna_boxes" / "train.csv")
    told = annotations.read(location)
    assert (len(told.boxes), sum(map(len, told.boxes.values()))) == (234, 140)
    manifest = open_manifest(str(real_data / "chestxray14"), labelling=Labelling(location))
    table = manifest.table
    assert table.num_rows == 234
    positive = [labels[OPACITY] for labels in table[schema.LABELS].to_pylist()]
    assert (sum(positive), sum(map(sum, table[schema.LABELS].to_pylist()))) == (90, 90)
    assert [bool(boxes) for boxes in table[schema.BOXES].to_pylist()] == [label == 1 for label in positive]
    ids = zip(table[schema.IMAGE_ID].to_pylist(), table[schema.PATIENT_ID].to_pylist(), strict=True)
    assert all(int(image.partition("_")[0]) == int(patient) for image, patient in ids)
    official = (real_data / "chestxray14" / "test_list.txt").read_text().split()
    splits = zip(table[schema.IMAGE_ID].to_pylist(), table[schema.SPLIT].to_pylist(), strict=True)
    assert all((split == "test") == (image in official) for image, split in splits)
    (row,) = make_rows(table.slice(positive.index(1), 1), PixelFormat(64), threads=1).to_pylist()
    kept = table[schema.BOXES][positive.index(1)].as_py()
    assert row[schema.BOXES] == kept
