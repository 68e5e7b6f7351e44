"""Boxes from a separate CSV file with VinBigData's columns: labels, images and notes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.evaluation.ground_truth import read_truth
from cxr.schema import PixelFormat
from cxr.sources import annotations, open_manifest
from cxr.sources.manifest import Manifest
from cxr.sources.options import ALL_IMAGES, Labeling
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


def test_annotations_replace_labels_and_boxes_only(archive: str, file: str) -> None:
    plain = {row[schema.IMAGE_ID]: row for row in open_manifest(archive).table.to_pylist()}
    manifest = open_manifest(archive, labeling=Labeling(boxes=file))
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
    listed = "boxes listed for these images: 3 (Cardiomegaly 1, Lung Opacity 2); images without any: 1"
    assert listed in manifest.notes
    assert "not listed in boxes.csv, skipped: 1 of 3 images, such as '00000003_000'" in manifest.notes
    missing = "missing from the archive: 1 of 3 images listed in boxes.csv, such as '00000009_000'"
    assert missing in manifest.notes


def test_readers_must_agree(archive: str, file: str) -> None:
    labels = open_manifest(archive, labeling=Labeling(boxes=file, min_readers=2)).table[schema.LABELS].to_pylist()
    assert [number for number, label in enumerate(labels[0]) if label == 1] == [OPACITY]
    with pytest.raises(UserError, match="expected boxes with named readers"):
        open_manifest(archive, labeling=Labeling(min_readers=2))
    with pytest.raises(UserError, match="--min-readers of 1 or more, got 0"):
        Labeling(min_readers=0)


def test_default_labeling_is_empty() -> None:
    assert not Labeling()
    assert Labeling().describe() == {}
    assert Labeling(boxes="/a", min_readers=2).describe() == {"boxes": "/a", "min_readers": 2}


def test_annotations_in_reports_and_shards(archive: str, file: str, tmp_path: Path) -> None:
    known = read_truth(archive, ALL_IMAGES, "test", [schema.LABELS], Labeling(boxes=file))
    assert known.table[schema.IMAGE_ID].to_pylist() == ["00000002_000.png"]
    assert known.findings == schema.VINBIGDATA_FINDINGS
    stored = write_shards(tmp_path / "shards", {"train": 2, "test": 2})
    assert read_truth(stored, ALL_IMAGES, "test", [schema.LABELS], Labeling()).table.num_rows == 2
    with pytest.raises(UserError, match=r"contains shards, whose labels cannot be changed: omit --boxes"):
        read_truth(stored, ALL_IMAGES, "test", [schema.LABELS], Labeling(boxes=file))


def annotated(archive: str, tmp_path: Path, rows: str, header: str = HEADER) -> Manifest:
    (tmp_path / "given.csv").write_text(header + rows)
    return open_manifest(archive, labeling=Labeling(boxes=str(tmp_path / "given.csv")))


def shown(manifest: Manifest, row: int = 0) -> dict[str, int]:
    """The non-negative labels of an image."""
    labels = manifest.table[schema.LABELS][row].as_py()
    return {finding: label for finding, label in zip(manifest.findings, labels, strict=True) if label}


def test_invalid_boxes_are_dropped_but_labels_remain(archive: str, tmp_path: Path) -> None:
    """Boxes that are flat, inverted, blank, or NaN as written by pandas."""
    rows = "00000001_000,ILD,5,R1,10,20,10,40\n00000001_000,Lung Opacity,7,R1,9,9,3,3\n00000001_000,?,3,R1,,1,2,3\n"
    manifest = annotated(archive, tmp_path, rows + "00000001_000,?,0,R2,1,nan,2,3\n")
    assert manifest.table[schema.BOXES].to_pylist() == [[]]
    assert shown(manifest) == {"Aortic enlargement": 1, "Cardiomegaly": 1, "ILD": 1, "Lung Opacity": 1}
    assert "boxes dropped: 2 without area, 2 with an invalid coordinate" in manifest.notes


def test_repeated_rows_count_once(archive: str, tmp_path: Path) -> None:
    row, other = "00000001_000,ILD,5,R1,1,2,3,4\n", "00000001_000,ILD,5,R2,1,2,3,4\n"
    boxes = annotated(archive, tmp_path, row + other + row).table[schema.BOXES].to_pylist()
    assert [[box["reader"] for box in of_image] for of_image in boxes] == [["R1", "R2"]]


def test_contradictions_of_a_reader_are_unknown_unless_another_draws_the_finding(
    archive: str, tmp_path: Path
) -> None:
    rows = "00000001_000,ILD,5,R1,1,2,3,4\n00000001_000,Nodule/Mass,8,R1,1,2,3,4\n00000001_000,No finding,14,R1,,,,\n"
    manifest = annotated(archive, tmp_path, rows + "00000001_000,Nodule/Mass,8,R2,5,5,9,9\n")
    assert shown(manifest) == {"ILD": -1, "Nodule/Mass": 1}
    assert [box["reader"] for box in manifest.table[schema.BOXES][0].as_py()] == ["R2"]
    assert "readings with both 'No finding' and a box: 1; the findings of these boxes are unknown" in manifest.notes


def test_classes_without_ids_and_decimal_ids(archive: str, tmp_path: Path) -> None:
    named = "image_id,class_name,x_min,y_min,x_max,y_max\n"
    manifest = annotated(archive, tmp_path, "00000001_000.PNG,cardiomegaly ,1,2,3,4\n", named)
    assert (manifest.findings, shown(manifest)) == (("cardiomegaly",), {"cardiomegaly": 1})
    manifest = annotated(archive, tmp_path, "00000001_000,Cardiomegaly,3.0,R1,1,2,3,4\n00000002_000,?,14.0,R1,,,,\n")
    assert [shown(manifest, row) for row in (0, 1)] == [{"Cardiomegaly": 1}, {}]


def test_an_unrecognized_vindr_class_makes_undrawn_findings_unknown(tmp_path: Path) -> None:
    rows = "1,Cardiomegally,1,2,3,4\n1,ILD,1,2,3,4\n2,No finding,,,,\n"
    (tmp_path / "vindr.csv").write_text("image_id,class_name,x_min,y_min,x_max,y_max\n" + rows)
    content = annotations.read(str(tmp_path / "vindr.csv"), "vindr")
    ill, healthy = content.labels_of(pa.array(["1", "2"]))
    labels = dict(zip(content.findings, ill.tolist(), strict=True))
    assert (labels.pop("ILD"), set(labels.values()), len(labels)) == (1, {-1}, 21)
    assert not healthy.any()
    note = "'Cardiomegally' (1): all other findings of these images are unknown"
    assert any(note in each for each in content.notes)


def test_findings_are_those_that_the_file_names(archive: str, tmp_path: Path) -> None:
    """Class numbers count only where every name agrees with VinBigData's; spellings of a word are one finding."""
    rows = (
        "00000001_000,Bulla,2,R1,1,2,3,4\n00000001_000,Old fracture,1,R1,1,2,3,4\n"
        "00000001_000,old_fracture,1,R2,5,6,7,8\n00000002_000,normal,0,R1,,,,\n00000003_000,,,R1,,,,\n"
    )
    manifest = annotated(archive, tmp_path, rows)
    assert manifest.findings == ("Bulla", "Old fracture")
    note = "findings in given.csv are read from class_name, because class_id differs from VinBigData's numbers"
    assert note in manifest.notes
    assert manifest.table[schema.LABELS].to_pylist() == [[1, 1], [0, 0], [0, 0]]
    assert [len(boxes) for boxes in manifest.table[schema.BOXES].to_pylist()] == [3, 0, 0]
    with pytest.raises(UserError, match="line 2: expected a finding in class_name for this box, got ''"):
        annotated(archive, tmp_path, "00000001_000,,1,2,3,4\n", "image_id,class_name,x_min,y_min,x_max,y_max\n")


def test_class_names_ignore_case_blanks_and_punctuation(archive: str, tmp_path: Path) -> None:
    rows = "00000001_000, cardioMEGALY ,1,2,3,4\n00000001_000,Nodule / Mass,1,2,3,4\n00000002_000,no_finding,,,,\n"
    manifest = annotated(archive, tmp_path, rows, "image_id,class_name,x_min,y_min,x_max,y_max\n")
    labels = shown(manifest)
    assert {finding for finding, label in labels.items() if label == 1} == {"cardioMEGALY", "Nodule / Mass"}
    assert not any("unrecognized" in note for note in manifest.notes)


def test_boxes_may_refer_to_an_image_of_another_size(archive: str, tmp_path: Path) -> None:
    """The archive's own boxes refer to 1024 x 1024 pixels."""
    header = HEADER.replace("\n", ",width,height\n")
    rows = "00000001_000,ILD,5,R1,1000,2500,1500,2900,2048.0,3000\n00000002_000,?,14,R1,,,,,,\n"
    frames = annotated(archive, tmp_path, rows, header).table[schema.BOXES_FRAME].to_pylist()
    assert frames == [[3000, 2048], None]


@pytest.mark.parametrize("size", ["0,9", "-5,9", "9.5,9", "nan,9", "inf,9", "1e400,9", "70000,9", "x,9", ",9"])
def test_an_invalid_size_names_its_line(size: str, archive: str, tmp_path: Path) -> None:
    header = HEADER.replace("\n", ",height,width\n")
    with pytest.raises(
        UserError, match="line 3: expected height and width as whole numbers of pixels from 1 to 65,535"
    ):
        annotated(archive, tmp_path, f"a,ILD,5,R1,1,2,3,4,8,8\nb,ILD,5,R1,1,2,3,4,{size}\n", header)
    with pytest.raises(UserError, match="line 3: expected the same height and width as in line 2"):
        annotated(archive, tmp_path, "a,ILD,5,R1,1,2,3,4,8,8\na,ILD,5,R2,1,2,3,4,8,9\n", header)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", "expected boxes as COCO JSON or as CSV with the columns image_id, "),
        ("image_id,class_id\na,14\n", "expected boxes as COCO JSON or as CSV with the columns image_id, "),
        ("image_id,x_min,y_min,x_max,y_max\n", "expected a column class_id or class_name"),
        (
            f"{HEADER}a,No finding,14,R1,,,,\nb,,15,R1,1,2,3,4\n",
            "line 3: expected a class_id from 0 to 14, got '15'",
        ),
        (
            f"{HEADER}a,ILD,5,R1,1,two,3,4\n",
            "line 2: expected numbers in x_min, y_min, x_max, y_max, got '1, two, 3, 4'",
        ),
        (f"{HEADER},ILD,5,R1,1,2,3,4\n", "line 2: expected an image name, got ''"),
        (f"{HEADER}a,ILD\n", "line 2: expected 8 fields, as in the header, got 2"),
        (
            f"{HEADER}elsewhere,No finding,14,R1,,,,\n",
            "with none of its 3 images; the archive has '00000001_000', .* the list 'elsewhere'",
        ),
    ],
)
def test_user_errors_say_what_was_expected(archive: str, tmp_path: Path, text: str, trouble: str) -> None:
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=trouble):
        open_manifest(archive, labeling=Labeling(boxes=str(tmp_path / "odd.csv")))


def test_the_rsna_boxes_on_real_x_rays(real_data: Path) -> None:
    location = str(real_data / "rsna_boxes" / "train.csv")
    told = annotations.read(location)
    assert (len(told.boxes), len(told.boxes.flatten())) == (234, 140)
    manifest = open_manifest(str(real_data / "chestxray14"), labeling=Labeling(boxes=location))
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
