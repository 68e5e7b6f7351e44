"""CheXpert: paths as keys, uncertain and unmentioned observations, and what counts as validation and test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import chexpert, find_source, labeler, open_manifest
from cxr.sources.options import ReadOptions
from tests.sources.archives import findings, read, write

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
ONE, TWO, THREE = (
    "patient00001/study1/view1_frontal",
    "patient00002/study2/view1_frontal",
    "patient00002/study2/view2_lateral",
)
TRAIN = [
    f"CheXpert-v1.0-small/train/{ONE}.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    f"CheXpert-v1.0-small/train/{TWO}.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,0.0,,,,,,1.0,",
    f"CheXpert-v1.0-small/train/{THREE}.jpg,Male,87,Lateral,,,,-1.0,1.0,,-1.0,0.0,,,,,,1.0,",
]
IN_VALID = "patient64541/study1/view1_frontal"
VALID = [f"CheXpert-v1.0-small/valid/{IN_VALID}.jpg,Male,73,Frontal,AP,0.0,1.0" + ",0.0" * 12]
IN_TEST = "patient64741/study1/view1_lateral"
TEST_LABELS = f"Path,{','.join(labeler.COLUMNS)}\ntest/{IN_TEST}.jpg,0.0,1.0{',0.0' * 12}\n"
IMAGES = [f"train/{path}.jpg" for path in (ONE, TWO, THREE)] + [f"valid/{IN_VALID}.jpg"]


def lists(train: list[str], valid: list[str] = VALID) -> dict[str, str]:
    return {"train.csv": "\n".join([HEADER, *train, ""]), "valid.csv": "\n".join([HEADER, *valid, ""])}


def test_labels_identity_and_views(tmp_path: Path) -> None:
    archive = write(tmp_path, lists(TRAIN), IMAGES)
    assert find_source(archive).name == "chexpert"
    manifest, rows = read(archive)
    assert manifest.findings == labeler.FINDINGS
    assert set(rows) == {ONE, TWO, THREE, IN_VALID}
    one, two, three = rows[ONE], rows[TWO], rows[THREE]
    assert findings(manifest, one) == {"Support Devices"}
    assert findings(manifest, one, schema.NEGATIVE) == set(labeler.FINDINGS) - {"Support Devices"}
    assert findings(manifest, two) == findings(manifest, three) == {"Lung Opacity", "Fracture"}
    assert findings(manifest, two, schema.NEGATIVE) == {"Consolidation"}
    assert json.loads(two[schema.EXTRA]) == {"uncertain": "Cardiomegaly|Edema"}
    assert one[schema.EXTRA] is None
    assert [rows[image][schema.VIEW] for image in (ONE, TWO, THREE)] == ["AP", "PA", "LATERAL"]
    assert [rows[image][schema.SEX] for image in (ONE, TWO, THREE)] == ["F", "M", "M"]
    assert [rows[image][schema.AGE_YEARS] for image in (ONE, TWO, THREE)] == [68, 87, 87]
    assert two[schema.PATIENT_ID] == three[schema.PATIENT_ID] == "patient00002"
    assert two[schema.STUDY_ID] == three[schema.STUDY_ID] == "patient00002/study2"


def test_valid_is_the_test_split_unless_there_are_test_images(tmp_path: Path) -> None:
    archive = write(tmp_path, lists(TRAIN), IMAGES)
    manifest, rows = read(archive)
    assert rows[IN_VALID][schema.SPLIT] == "test"
    assert {rows[image][schema.SPLIT] for image in (ONE, TWO, THREE)} == {"train", "val"}
    assert (
        "no test images, so the images in valid are the test split; validation is a part of train" in manifest.notes
    )
    write(tmp_path, {"test_labels.csv": TEST_LABELS}, [f"test/{IN_TEST}.jpg"])
    manifest, rows = read(archive)
    assert {image: row[schema.SPLIT] for image, row in rows.items()} == {
        ONE: "train", TWO: "train", THREE: "train", IN_VALID: "val", IN_TEST: "test"
    }  # fmt: skip
    assert not any("test split" in note for note in manifest.notes)
    assert findings(manifest, rows[IN_TEST]) == {"Enlarged Cardiomediastinum"}
    assert rows[IN_TEST][schema.VIEW] == "LATERAL", "the name of the image says so, without the columns"
    assert (rows[IN_TEST][schema.SEX], rows[IN_TEST][schema.AGE_YEARS]) == (None, None)


def test_missing_unlisted_and_copied_images(tmp_path: Path) -> None:
    images = ["train/patient00001/study1/view1_frontal.png", "train/patient00009/study1/view1_frontal.jpg", "odd.jpg"]
    manifest, rows = read(write(tmp_path, lists(TRAIN), images))
    assert set(rows) == {ONE, "patient00009/study1/view1_frontal", "odd.jpg"}
    assert findings(manifest, rows[ONE]) == {"Support Devices"}
    unlisted = rows["patient00009/study1/view1_frontal"]
    assert findings(manifest, unlisted, schema.UNKNOWN) == set(labeler.FINDINGS)
    assert (unlisted[schema.PATIENT_ID], unlisted[schema.VIEW], unlisted[schema.SEX]) == (
        "patient00009",
        "FRONTAL",
        None,
    )
    assert (rows["odd.jpg"][schema.PATIENT_ID], rows["odd.jpg"][schema.STUDY_ID]) == ("odd.jpg", None)
    assert manifest.notes[1:] == [
        "missing from the archive: 3 of 4 images listed in train.csv and valid.csv; continuing with 3 images",
        "not listed in train.csv and valid.csv, so labels are unknown: 2 images",
    ]


def test_images_may_be_in_other_folders_than_the_list_says(tmp_path: Path) -> None:
    batches = ["batch 1 (validate & csv)/valid", "batch 2 (train 1)"]
    images = [f"{batches[0]}/{IN_VALID}.jpg", *(f"{batches[1]}/{path}.jpg" for path in (ONE, TWO, THREE))]
    manifest, rows = read(write(tmp_path, lists(TRAIN), images))
    assert findings(manifest, rows[ONE]) == {"Support Devices"}
    assert rows[IN_VALID][schema.SPLIT] == "test"
    assert {rows[image][schema.SPLIT] for image in (ONE, TWO, THREE)} == {"train", "val"}
    assert not any("not listed" in note for note in manifest.notes)


def test_repeated_and_contradictory_rows(tmp_path: Path) -> None:
    again = TRAIN[1].replace("1.0,,-1.0,0.0", "1,,-1,0")
    other = TRAIN[2].replace("Male,87", "Male,88").replace("-1.0,1.0,,-1.0,0.0", "-1.0,1.0,,0.0,0.0")
    healthy_with_edema = TRAIN[0].replace("1.0,,,,,,,,,0.0", "1.0,,,,,1.0,,,,0.0")
    manifest, rows = read(write(tmp_path, lists([healthy_with_edema, *TRAIN[1:], again, other]), IMAGES))
    assert findings(manifest, rows[TWO]) == {"Lung Opacity", "Fracture"}
    assert (rows[THREE][schema.AGE_YEARS], rows[THREE][schema.SEX]) == (None, "M")
    assert json.loads(rows[THREE][schema.EXTRA]) == {"uncertain": "Cardiomegaly"}, (
        "Edema is contradictory, not uncertain"
    )
    assert findings(manifest, rows[ONE], schema.UNKNOWN) == {"Edema"}
    assert manifest.notes[2:] == [
        "contradictory rows in train.csv and valid.csv: 1 image; the values that differ are unknown",
        "'No Finding' together with a finding in train.csv and valid.csv: 1 image; these findings are unknown",
    ]


@pytest.mark.parametrize(
    ("sex", "age", "frontal", "view", "expected"),
    [
        ("Unknown", "0", "Frontal", "AP", (None, None, "AP")),
        ("female", "90.0", "frontal", "LL", ("F", 90, "FRONTAL")),
        ("Male", "18", "Frontal", "", ("M", 18, "FRONTAL")),
        ("", "x", "Lateral", "AP", (None, None, "LATERAL")),
        ("M", "200", "", "", ("M", None, "FRONTAL")),
    ],
)
def test_odd_metadata_is_unknown(
    tmp_path: Path, sex: str, age: str, frontal: str, view: str, expected: tuple[str | None, float | None, str]
) -> None:
    train = [TRAIN[0].replace("Female,68,Frontal,AP", f"{sex},{age},{frontal},{view}")]
    _, rows = read(write(tmp_path, lists(train), IMAGES))
    assert (rows[ONE][schema.SEX], rows[ONE][schema.AGE_YEARS], rows[ONE][schema.VIEW]) == expected


@pytest.mark.parametrize(
    ("train", "trouble"),
    [
        (
            "Path,Sex\na,b\n",
            "line 1: expected the columns Path, No Finding, Enlarged Cardiomediastinum, got 2 columns",
        ),
        (HEADER, "expected a header and rows of UTF-8 text, got no rows"),
        (f"{HEADER}\n{TRAIN[0]},1\n", "row 2: expected 19 fields, as in the header, got 20"),
        (
            f"{HEADER}\n{TRAIN[0]}\n{TRAIN[1].replace('-1.0', '-2')}\n",
            "row 3: expected a value of 1, 0, -1 or blank in",
        ),
        (
            f"{HEADER}\nview1_frontal.jpg{',' * 18}\n",
            "row 2: expected a Path such as train/patient00001/study1/view1_",
        ),
    ],
)
def test_damaged_lists_are_errors_that_name_the_file_and_the_row(tmp_path: Path, train: str, trouble: str) -> None:
    archive = write(tmp_path, {"train.csv": train}, IMAGES)
    with pytest.raises(UserError, match=rf"train.csv.*{trouble}"):
        open_manifest(archive, ReadOptions(source="chexpert"))


def test_an_archive_without_lists_or_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected train.csv or .*, got none of them"):
        chexpert.manifest(write(tmp_path, {}, IMAGES))
    with pytest.raises(UserError, match="expected X-rays in"):
        chexpert.manifest(write(tmp_path / "lists", lists(TRAIN)))
