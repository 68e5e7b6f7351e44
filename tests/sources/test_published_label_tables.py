"""The sources read the real label tables as torchxrayvision's dataset classes do (Cohen et al., MIDL 2022).

The package ships the tables as data; it is not imported, and none of its own requirements are needed:

    pip install --no-deps --target DIR torchxrayvision==1.5.7
    PYTHONPATH=DIR pytest tests/sources/test_published_label_tables.py

The numbers are those of its classes with all views and all images of a patient. PadChest's differ from ours on
purpose in some words (`DIFFERENT_WORDS`). MIMIC-CXR-JPG's and VinDr-CXR's lists are not in the package, as their
terms require an account, nor are CheXpert's valid.csv and the RSNA's classes.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cxr import schema
from cxr.sources import image_files, labeler, open_manifest, padchest
from cxr.sources.label_rows import word_key
from cxr.sources.manifest import Manifest
from cxr.sources.padchest_words import WORDS
from cxr.storage import FileEntry

pytestmark = pytest.mark.slow

Row = dict[str, str]


@pytest.fixture(scope="module")
def tables() -> Path:
    """The folder of label tables in torchxrayvision."""
    found = importlib.util.find_spec("torchxrayvision")
    if found is None or found.origin is None:
        pytest.skip("torchxrayvision, which ships published label tables, is not installed (see this module)")
    return Path(found.origin).parent / "data"


def rows_of(path: Path) -> list[Row]:
    data = path.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            text = file.read(file.namelist()[0]).decode()
    else:
        text = gzip.decompress(data).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def opened(folder: Path, table: Path, name: str, images: Iterable[str]) -> Manifest:
    """The manifest of an archive with this list as `name`, and with these images."""
    data = table.read_bytes()
    if table.suffix == ".zip":
        with zipfile.ZipFile(table) as file:
            data = file.read(file.namelist()[0])
    elif not name.endswith(".gz"):
        data = gzip.decompress(data)
    (folder / name).write_bytes(data)
    entries = [FileEntry(f"{folder}/{image}", image, 1) for image in dict.fromkeys(images)]
    with mock.patch.object(image_files, "list_files", return_value=entries):
        return open_manifest(str(folder))


def labels_of(manifest: Manifest) -> np.ndarray:
    """int8 (images, findings)."""
    flat = manifest.table[schema.LABELS].combine_chunks().flatten().to_numpy()
    return flat.reshape(manifest.table.num_rows, len(manifest.findings))


def counts(labels_NF: np.ndarray, findings: Iterable[str], value: int = schema.POSITIVE) -> dict[str, int]:
    return dict(zip(findings, (labels_NF == value).sum(0).tolist(), strict=True))


def test_chexpert(tables: Path, tmp_path: Path) -> None:
    """Uncertain and blank are unknown; No Finding makes all but Support Devices negative."""
    table = tables / "chexpert_train.csv.gz"
    manifest = opened(tmp_path, table, "train.csv", (row["Path"].partition("/")[2] for row in rows_of(table)))
    assert manifest.notes == []
    labels_NF = labels_of(manifest)
    assert counts(labels_NF, manifest.findings) == {
        "Enlarged Cardiomediastinum": 10_798, "Cardiomegaly": 27_000, "Lung Opacity": 105_581, "Lung Lesion": 9_186,
        "Edema": 52_246, "Consolidation": 14_783, "Pneumonia": 6_039, "Atelectasis": 33_376, "Pneumothorax": 19_448,
        "Pleural Effusion": 86_187, "Pleural Other": 3_523, "Fracture": 9_040, "Support Devices": 116_001,
    }  # fmt: skip
    assert counts(labels_NF, manifest.findings, schema.NEGATIVE) == {
        "Enlarged Cardiomediastinum": 35_625, "Cardiomegaly": 30_147, "Lung Opacity": 26_559, "Lung Lesion": 23_274,
        "Edema": 38_646, "Consolidation": 41_642, "Pneumonia": 24_022, "Atelectasis": 23_226, "Pneumothorax": 65_311,
        "Pleural Effusion": 46_327, "Pleural Other": 22_677, "Fracture": 23_802, "Support Devices": 6_137,
    }  # fmt: skip
    uncertain = [text.count("|") + 1 for text in manifest.table[schema.EXTRA].to_pylist() if text]
    assert sum(uncertain) == sum(row[name] == "-1.0" for row in rows_of(table) for name in labeler.FINDINGS)
    columns = manifest.table
    assert len(columns[schema.PATIENT_ID].unique()) == 64_540
    assert len(columns[schema.STUDY_ID].unique()) == 187_641
    views = {"AP": 161_590, "PA": 29_420, "FRONTAL": 17, "LATERAL": 32_387}
    assert Counter(columns[schema.VIEW].to_pylist()) == views
    assert Counter(columns[schema.SEX].to_pylist()) == {"M": 132_636, "F": 90_777, None: 1}
    assert columns[schema.AGE_YEARS].null_count == 3


# Words that torchxrayvision's search for a text counts as a finding, and we do not.
DIFFERENT_WORDS = {
    "Effusion": {"pericardial effusion"},
    "Emphysema": {"subcutaneous emphysema"},
    "Mass": {"mediastinal mass", "breast mass", "soft tissue mass"},
    "Nodule": {"pseudonodule"},
    "Tuberculosis": {"tuberculosis sequelae"},
}
SEARCHED = {  # where it searches for other texts than the finding's name
    "Infiltration": "infiltrates;interstitial pattern;ground glass pattern;alveolar pattern;consolidation;air "
    "bronchogram",
    "Pleural_Thickening": "pleural thickening",
    "Consolidation": "consolidation;air bronchogram",
    "Hilar Enlargement": "hilar enlargement;adenopathy;pulmonary artery enlargement",
    "Support Devices": "device;pacemaker",
    "Tube": "tube';stent'",
}
PADCHEST_COUNTS = {
    "Air Trapping": 6_109, "Aortic Atheromatosis": 2_546, "Aortic Elongation": 11_780, "Atelectasis": 8_843,
    "Bronchiectasis": 2_695, "Cardiomegaly": 14_963, "Consolidation": 2_532, "Costophrenic Angle Blunting": 6_775,
    "Edema": 1_451, "Effusion": 9_984, "Emphysema": 1_738, "Fibrosis": 1_227, "Flattened Diaphragm": 990,
    "Fracture": 4_622, "Granuloma": 3_908, "Hemidiaphragm Elevation": 2_459, "Hernia": 2_358,
    "Hilar Enlargement": 7_346, "Infiltration": 19_931, "Mass": 1_487, "Nodule": 6_226, "Pleural_Thickening": 5_152,
    "Pneumonia": 7_666, "Pneumothorax": 504, "Scoliosis": 8_329, "Support Devices": 3_608, "Tube": 7_066,
    "Tuberculosis": 1_306,
}  # fmt: skip


def test_padchest(tables: Path, tmp_path: Path) -> None:
    """Each image has a finding if torchxrayvision says so, but for the words that are listed above."""
    table = tables / f"{padchest.LIST}.gz"
    rows = rows_of(table)
    manifest = opened(tmp_path, table, table.name, (f"{row['ImageDir']}/{row['ImageID']}" for row in rows))
    assert not any("unrecognized" in note or "missing" in note for note in manifest.notes)
    labels = dict(zip(manifest.table[schema.IMAGE_ID].to_pylist(), labels_of(manifest), strict=True))
    theirs: Counter[str] = Counter()
    for row in rows:
        words = {word.strip(" []'") for word in row["Labels"].split(",")} - {"", "nan"}
        of_image = dict(zip(manifest.findings, labels[row["ImageID"]].tolist(), strict=True))
        ours = {name for name, label in of_image.items() if label == schema.POSITIVE}
        found = {name for name in PADCHEST_COUNTS if any(text in row["Labels"] for text in searched(name))}
        for name in PADCHEST_COUNTS:
            named = {word for word in words if name in WORDS.get(word_key(word), ())}
            if "normal" in words:  # contradictory if it is named at all
                assert (of_image[name] == schema.UNKNOWN) >= bool(named)
            else:
                assert (name in ours) == bool(named)
            if name == "Support Devices":  # for us tubes, catheters and valves are devices, as in CheXpert
                assert (name in found) <= bool(named)
            else:
                assert bool(named | (words & DIFFERENT_WORDS.get(name, set()))) == (name in found)
        if row["Labels"] and is_counted(row):
            theirs.update(found)
    assert theirs == PADCHEST_COUNTS
    columns = manifest.table
    assert len(columns[schema.PATIENT_ID].unique()) == 67_625
    assert len(columns[schema.STUDY_ID].unique()) == 109_931
    assert Counter(columns[schema.SEX].to_pylist()) == {"M": 80_920, "F": 79_919, "O": 18, None: 4}
    assert columns[schema.AGE_YEARS].null_count == 6


def searched(finding: str) -> list[str]:
    return SEARCHED.get(finding, finding.lower()).split(";")


def is_counted(row: Row) -> bool:
    """Whether torchxrayvision's class contains the image: not damaged, and of a patient born before 2009."""
    return row["ImageID"].removesuffix(".png") not in padchest.DAMAGED and float(row["PatientBirth"] or "nan") < 2009


def test_chestxray14(tables: Path, tmp_path: Path) -> None:
    table = tables / "Data_Entry_2017_v2020.csv.gz"
    (tmp_path / "BBox_List_2017.csv").write_bytes(gzip.decompress((tables / "BBox_List_2017.csv.gz").read_bytes()))
    manifest = opened(tmp_path, table, "Data_Entry_2017_v2020.csv", (row["Image Index"] for row in rows_of(table)))
    assert counts(labels_of(manifest), manifest.findings) == {
        "Atelectasis": 11_559, "Cardiomegaly": 2_776, "Effusion": 13_317, "Infiltration": 19_894, "Mass": 5_782,
        "Nodule": 6_331, "Pneumonia": 1_431, "Pneumothorax": 5_302, "Consolidation": 4_667, "Edema": 2_303,
        "Emphysema": 2_516, "Fibrosis": 1_686, "Pleural_Thickening": 3_385, "Hernia": 227,
    }  # fmt: skip
    assert sum(len(boxes) for boxes in manifest.table[schema.BOXES].to_pylist() if boxes) == 984
    rows = rows_of(table)
    assert Counter(manifest.table[schema.SEX].to_pylist()) == Counter(row["Patient Gender"] for row in rows)
    assert manifest.table[schema.AGE_YEARS].null_count == sum(int(row["Patient Age"]) > 130 for row in rows)


def test_rsna_pneumonia(tables: Path, tmp_path: Path) -> None:
    table = tables / "kaggle_stage_2_train_labels.csv.zip"
    images = (f"stage_2_train_images/{row['patientId']}.dcm" for row in rows_of(table))
    manifest = opened(tmp_path, table, "stage_2_train_labels.csv", images)
    labels_NF = labels_of(manifest)
    assert ((labels_NF == schema.POSITIVE).sum(), (labels_NF == schema.NEGATIVE).sum()) == (6_012, 20_672)
    boxes = manifest.table[schema.BOXES].to_pylist()
    assert sum(map(len, boxes)) == 9_555
    assert [bool(each) for each in boxes] == (labels_NF[:, 0] == schema.POSITIVE).tolist()


def test_vinbigdata(tables: Path, tmp_path: Path) -> None:
    table = tables / "vinbigdata-train.csv.gz"
    manifest = opened(tmp_path, table, "train.csv", (f"train/{row['image_id']}.dicom" for row in rows_of(table)))
    assert counts(labels_of(manifest), manifest.findings) == {
        "Aortic enlargement": 3_067, "Atelectasis": 186, "Calcification": 452, "Cardiomegaly": 2_300,
        "Consolidation": 353, "ILD": 386, "Infiltration": 613, "Lung Opacity": 1_322, "Nodule/Mass": 826,
        "Other lesion": 1_134, "Pleural effusion": 1_032, "Pleural thickening": 1_981, "Pneumothorax": 96,
        "Pulmonary fibrosis": 1_617,
    }  # fmt: skip


def test_siim(tables: Path, tmp_path: Path) -> None:
    """Its class counts rows of the list, of which a pneumothorax in several pieces has several."""
    table = tables / "siim-pneumothorax-train-rle.csv.gz"
    images = (f"{row['ImageId']}.dcm" for row in rows_of(table))
    manifest = opened(tmp_path, table, "train-rle.csv", images)
    labels_N = labels_of(manifest)[:, 0]
    masks = manifest.table[schema.MASKS].to_pylist()
    pieces = [len(of_image) for of_image, label in zip(masks, labels_N, strict=True) if label == schema.POSITIVE]
    assert (sum(pieces), (labels_N == schema.NEGATIVE).sum()) == (3_576, 9_378)
