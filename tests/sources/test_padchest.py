"""PadChest: words and findings, incomplete lists of words, metadata, and values with line breaks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import find_source, open_manifest, padchest
from cxr.sources.options import ReadOptions
from cxr.sources.padchest_words import FINDINGS, WITHOUT_FINDING, WORDS
from tests.sources.archives import findings, read, write

HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,MethodLabel,Report,"
    "Labels"
)
IMAGES = ["0/a.png", "0/b.png", "54/c.png"]


def line(
    image: str, labels: str, *, patient: str = "p1", birth: str = "1930.0", sex: str = "F", view: str = "PA"
) -> str:
    return f'0,{image}.png,0,20140915,s{patient},{patient},{birth},{sex},{view},Physician,"sin\nhallazg .","{labels}"'


def archive(folder: Path, *lines: str, images: list[str] = IMAGES) -> str:
    return write(folder, {padchest.LIST: "\n".join([HEADER, *lines, ""])}, images)


def test_labels_identity_and_metadata(tmp_path: Path) -> None:
    lines = [
        line("a", "['cardiomegaly', ' pleural effusion', 'kyphosis']"),
        line("b", "['normal']", view="L"),
        line("c", "['NSG tube']", patient="p2", birth="", sex="None", view="AP_horizontal"),
    ]
    uri = archive(tmp_path, *lines)
    assert find_source(uri).name == "padchest"
    manifest, rows = read(uri)
    assert manifest.findings == FINDINGS
    assert list(rows) == ["a.png", "b.png", "c.png"]
    a, b, c = rows.values()
    assert findings(manifest, a) == {"Cardiomegaly", "Effusion"}
    assert findings(manifest, a, schema.NEGATIVE) == set(FINDINGS) - {"Cardiomegaly", "Effusion"}
    assert findings(manifest, b, schema.NEGATIVE) == set(FINDINGS)
    assert findings(manifest, c) == {"Support Devices", "Tube"}
    assert [(row[schema.VIEW], row[schema.SEX], row[schema.AGE_YEARS]) for row in rows.values()] == [
        ("PA", "F", 84),
        ("LATERAL", "F", 84),
        ("AP", None, None),
    ]
    assert (a[schema.PATIENT_ID], a[schema.STUDY_ID], c[schema.PATIENT_ID]) == ("p1", "sp1", "p2")
    assert a[schema.SPLIT] == b[schema.SPLIT]
    extra = {
        "Projection": "PA",
        "MethodLabel": "Physician",
        "Labels": "['cardiomegaly', ' pleural effusion', 'kyphosis']",
    }
    assert json.loads(a[schema.EXTRA]) == extra, "without the report"
    assert f"words in {padchest.LIST} that belong to none of the findings: 'kyphosis' (1)" in manifest.notes


@pytest.mark.parametrize(
    ("labels", "positive", "others"),
    [
        ("['nodule', 'exclude']", {"Nodule"}, schema.UNKNOWN),
        ("['nodule', 'unchanged']", {"Nodule"}, schema.NEGATIVE),
        ("['unchanged']", set(), schema.UNKNOWN),
        ("['', ' suboptimal study']", set(), schema.UNKNOWN),
        ("['chronic changes']", set(), schema.NEGATIVE),
        ("[]", set(), schema.UNKNOWN),
        ("", set(), schema.UNKNOWN),
        ("nan", set(), schema.UNKNOWN),
        ("['nodule', 'gallstones']", {"Nodule"}, schema.UNKNOWN),
        ("['Consolidation']", {"Consolidation", "Infiltration"}, schema.NEGATIVE),
        ("['pseudonodule', 'pericardial effusion', 'subcutaneous emphysema']", set(), schema.NEGATIVE),
    ],
)
def test_words_are_mapped_to_findings(tmp_path: Path, labels: str, positive: set[str], others: int) -> None:
    manifest, rows = read(archive(tmp_path, line("a", labels), images=["a.png"]))
    assert findings(manifest, rows["a.png"]) == positive
    assert findings(manifest, rows["a.png"], others) == set(FINDINGS) - positive
    assert any("unrecognized words in" in note and "'gallstones' (1)" in note for note in manifest.notes) == (
        "gallstones" in labels
    )


def test_normal_beside_findings_is_contradictory(tmp_path: Path) -> None:
    manifest, rows = read(
        archive(tmp_path, line("a", "['normal', 'infiltrates', 'kyphosis']"), line("b", "['normal']"))
    )
    assert findings(manifest, rows["a.png"], schema.UNKNOWN) == {"Infiltration"}
    assert (
        f"'normal' together with findings in {padchest.LIST}: 1 image; these findings are unknown" in manifest.notes
    )


def test_odd_rows(tmp_path: Path) -> None:
    lines = [
        line("a", "['nodule']", birth="2020", view="COSTAL"),
        line("a", "['mass']", birth="2020", view="COSTAL"),
        line("b", "['nodule']", sex="O", view="EXCLUDE"),
        line("b", "['nodule']", sex="O", view="EXCLUDE"),
        line("missing", "['nodule']"),
    ]
    damaged = f"5/{min(padchest.DAMAGED)}.png"
    manifest, rows = read(archive(tmp_path, *lines, images=["0/a.png", "b.jpg", damaged]))
    a, b, unlisted = rows["a.png"], rows["b.jpg"], rows[damaged[2:]]
    assert findings(manifest, a, schema.UNKNOWN) == set(FINDINGS), "its rows have different words"
    assert (a[schema.VIEW], a[schema.AGE_YEARS], b[schema.VIEW], b[schema.SEX]) == (None, None, None, "O")
    assert findings(manifest, b) == {"Nodule"}
    assert findings(manifest, unlisted, schema.UNKNOWN) == set(FINDINGS)
    assert unlisted[schema.PATIENT_ID] == damaged[2:-4]
    assert manifest.notes[1:] == [
        f"missing from the archive: 1 of 3 images listed in {padchest.LIST}; continuing with 3 images",
        f"not listed in {padchest.LIST}, so labels are unknown: 1 image",
        f"contradictory rows in {padchest.LIST}: 1 image; the values that differ are unknown",
        "known to be damaged in the distribution: 1 image",
    ]


def test_the_compressed_list_is_read_too(tmp_path: Path) -> None:
    uri = archive(tmp_path, line("a", "['nodule']"))
    plain = tmp_path / padchest.LIST
    (tmp_path / f"{padchest.LIST}.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    assert find_source(uri).name == "padchest"
    manifest, rows = read(uri)
    assert findings(manifest, rows["a.png"]) == {"Nodule"}


def test_every_word_is_listed_once() -> None:
    assert len(WORDS) + len(WITHOUT_FINDING) + len(padchest.UNINFORMATIVE) + 2 == 193
    assert not WORDS.keys() & WITHOUT_FINDING.keys()
    assert {finding for named in WORDS.values() for finding in named} == set(FINDINGS)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        (None, "expected PADCHEST_.*csv or .*gz in .*, got neither: add it, or use --source folder"),
        ("ImageID\na\n", "line 1: expected the columns ImageID, Labels, got 1 columns without Labels"),
        ("ImageID,Labels\n ,[]\n", "row 2: expected an image name, got ''"),
        ("ImageID,Labels\na,b,c\n", "row 2: expected 2 fields, as in the header, got 3"),
    ],
)
def test_user_errors_name_the_file_and_the_row(tmp_path: Path, text: str | None, trouble: str) -> None:
    uri = write(tmp_path, {} if text is None else {padchest.LIST: text}, IMAGES)
    with pytest.raises(UserError, match=trouble):
        open_manifest(uri, ReadOptions(source="padchest"))
