"""MIMIC-CXR-JPG: three lists joined by image and by study, with any of them missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import find_source, labeler, open_manifest
from cxr.sources.options import ReadOptions
from tests.sources.archives import findings, read, write

SPLIT = """dicom_id,study_id,subject_id,split
a1,501,10000001,train
a2,501,10000001,train
b1,502,10000002,validate
c1,503,10000003,test
"""
IN_METADATA = "PerformedProcedureStepDescription,ViewPosition,Rows,ViewCodeSequence_CodeMeaning"
METADATA = f"""dicom_id,subject_id,study_id,{IN_METADATA}
a1,10000001,501,CHEST (PA AND LAT),PA,3056,postero-anterior
a2,10000001,501,CHEST (PA AND LAT),,3056,lateral
b1,10000002,502,CHEST (PORTABLE AP),AP LLD,2500,
c1,10000003,503,,SWIMMERS,2500,
"""
LABELS = """subject_id,study_id,Atelectasis,Cardiomegaly,Edema,No Finding,Support Devices
10000001,501,1.0,,-1.0,,
10000002,502,,,,1.0,1.0
"""
IMAGES = [
    "files/p10/p10000001/s501/a1.jpg",
    "files/p10/p10000001/s501/a2.jpg",
    "files/p10/p10000002/s502/b1.jpg",
    "files/p10/p10000003/s503/c1.jpg",
]
LISTS = {"split": SPLIT, "metadata": METADATA, "chexpert": LABELS}


def files(**lists: str) -> dict[str, str | bytes]:
    return {f"mimic-cxr-2.0.0-{name}.csv": text for name, text in lists.items()}


def test_labels_identity_views_and_splits(tmp_path: Path) -> None:
    compressed = {f"{name}.gz": gzip.compress(str(text).encode(), mtime=0) for name, text in files(**LISTS).items()}
    archive = write(tmp_path, compressed, IMAGES)
    assert find_source(archive).name == "mimic-cxr-jpg"
    manifest, rows = read(archive)
    assert manifest.findings == labeler.FINDINGS
    assert list(rows) == ["a1", "a2", "b1", "c1"]
    assert findings(manifest, rows["a1"]) == findings(manifest, rows["a2"]) == {"Atelectasis"}
    assert findings(manifest, rows["a1"], schema.NEGATIVE) == set()
    assert findings(manifest, rows["b1"]) == {"Support Devices"}
    assert findings(manifest, rows["b1"], schema.NEGATIVE) == set(labeler.FINDINGS) - {"Support Devices"}
    assert findings(manifest, rows["c1"], schema.UNKNOWN) == set(labeler.FINDINGS)
    assert [row[schema.SPLIT] for row in rows.values()] == ["train", "train", "val", "test"]
    assert [row[schema.VIEW] for row in rows.values()] == ["PA", "LATERAL", "LLD", "LATERAL"]
    assert [row[schema.PATIENT_ID] for row in rows.values()] == ["10000001", "10000001", "10000002", "10000003"]
    assert [row[schema.STUDY_ID] for row in rows.values()] == ["501", "501", "502", "503"]
    extra = {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "uncertain": "Edema"}
    assert json.loads(rows["a1"][schema.EXTRA]) == extra
    assert rows["c1"][schema.EXTRA] is None
    note = "without observations in mimic-cxr-2.0.0-chexpert.csv.gz, so labels are unknown: 1 image"
    assert note in manifest.notes


def test_negbio_is_read_where_chexpert_is_missing(tmp_path: Path) -> None:
    negbio = LABELS.replace("501,1.0", "501,0.0")
    write(tmp_path, files(**LISTS, negbio=negbio), IMAGES)
    assert findings(*_first(tmp_path)) == {"Atelectasis"}
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv").unlink()
    assert findings(*_first(tmp_path)) == set()


def _first(folder: Path):
    manifest, rows = read(str(folder))
    return manifest, rows["a1"]


def test_without_split_and_metadata_the_path_names_subject_and_study(tmp_path: Path) -> None:
    manifest, rows = read(write(tmp_path, files(chexpert=LABELS), [*IMAGES, "else/x.jpg"]))
    assert (rows["a1"][schema.PATIENT_ID], rows["a1"][schema.STUDY_ID]) == ("10000001", "501")
    assert findings(manifest, rows["a1"]) == {"Atelectasis"}
    assert (rows["x"][schema.PATIENT_ID], rows["x"][schema.STUDY_ID], rows["x"][schema.VIEW]) == ("x", None, None)
    assert {row[schema.SPLIT] for row in rows.values()} == {"train", "val"}
    assert manifest.notes[1:] == [
        "missing from the archive: mimic-cxr-2.0.0-split.csv",
        "missing from the archive: mimic-cxr-2.0.0-metadata.csv",
        "without observations in mimic-cxr-2.0.0-chexpert.csv, so labels are unknown: 2 images",
    ]


def test_images_in_one_list_only_and_odd_values(tmp_path: Path) -> None:
    split = SPLIT.replace("b1,502,10000002,validate", "b1,502,10000002,later") + "a1,501,10000001,test\n"
    metadata = METADATA.replace("PA,3056", "UPSIDE DOWN,3056").replace("c1,", "z9,")
    manifest, rows = read(write(tmp_path, files(**LISTS | {"split": split, "metadata": metadata}), IMAGES[1:]))
    assert {rows["a2"][schema.SPLIT], rows["b1"][schema.SPLIT]} == {"train", "val"}, "by a hash: no image is validate"
    assert (rows["c1"][schema.SPLIT], rows["c1"][schema.VIEW]) == ("test", None)
    assert manifest.notes[1:] == [
        "missing from the archive: 1 of 4 images listed in mimic-cxr-2.0.0-split.csv; continuing with 3 images",
        "contradictory rows in mimic-cxr-2.0.0-split.csv: 1 image; the values that differ are unknown",
        "missing from the archive: 2 of 4 images listed in mimic-cxr-2.0.0-metadata.csv; continuing with 3 images",
        "not listed in mimic-cxr-2.0.0-metadata.csv, so views are unknown: 1 image",
        "without observations in mimic-cxr-2.0.0-chexpert.csv, so labels are unknown: 1 image",
    ]


def test_all_images_of_a_subject_are_in_the_split_of_any(tmp_path: Path) -> None:
    split = SPLIT.replace("a2,501,10000001,train", "a2,501,10000001,test")
    _, rows = read(write(tmp_path, files(**LISTS | {"split": split}), IMAGES))
    assert rows["a1"][schema.SPLIT] == rows["a2"][schema.SPLIT] == "test"


@pytest.mark.parametrize(
    ("lists", "trouble"),
    [
        ({"split": SPLIT}, r"expected mimic-cxr-2.0.0-chexpert.csv.gz or .* in .*, got neither: add one"),
        ({"chexpert": LABELS.replace("1.0", "yes", 1)}, "chexpert.csv, row 2: expected a value of 1, 0, -1 or blank"),
        (
            {"chexpert": LABELS, "split": "dicom_id,split\na,train\n"},
            "split.csv, line 1: expected the columns dicom_id",
        ),
    ],
)
def test_user_errors_name_the_file(tmp_path: Path, lists: dict[str, str], trouble: str) -> None:
    with pytest.raises(UserError, match=trouble):
        open_manifest(write(tmp_path, files(**lists), IMAGES), ReadOptions(source="mimic-cxr-jpg"))
