"""Tables of labels in all forms: images, findings, patients, splits, notes and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cxr import schema
from cxr.errors import UserError
from cxr.sources import labeler, open_manifest
from cxr.sources.chestxray14 import manifest as read_chestxray14
from cxr.sources.labels import with_label_table
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling
from tests.sources.archives import write

IMAGES = ("ward/a.png", "ward/b.dcm", "ward/c.PNG", "ward/d.jpeg")
LABELS = {"ward/a.png": [1, 0], "ward/b.dcm": [1, 1], "ward/c.PNG": [0, 0]}  # of Effusion and Mass

WIDE = "file,Effusion,Mass\na,1,0\nb.dcm,1,1\nward/c,0,0\n"
EXCEL = "Datei;filename;Effusion;Mass;;\r\n1;a.png;1,0;0,0;;\r\n2;b.dcm;WAHR;1;;;\r\n3;c.png;0;FALSCH;;\r\n"
FORMS: dict[str, str | bytes] = {
    "wide.csv": WIDE,
    "words.tsv": "Image Index\tEffusion\tMass\na.png\tTRUE\tno\nb\tyes\tTrue\nc.png\tfalse\t0.0\n",
    "no_finding.csv": "path,Effusion,Mass,No Finding\na,1,0,\nb,1,1,0\nc,,,1\n",
    "pipe.csv": "image_id,Finding Labels\na,Effusion\nb,Effusion|Mass\nc,No Finding\n",
    "comma.csv": 'image_id,labels\na,Effusion\nb,"effusion, Mass"\nc,none\n',
    "semicolon.csv": "image_id,labels\na,Effusion\nb,Mass; Effusion\nc,normal\n",
    "long.csv": "SOPInstanceUID,finding\na,Effusion\nb,Effusion\nb,Mass\nc,No finding\n",
    "long_values.csv": "image,class,value\na,Effusion,1\na,Mass,0\nb,Effusion,1\nb,Mass,1\nc,Effusion,0\nc,Mass,0\n",
    "excel.csv": EXCEL.encode("utf-16"),
    "excel_bom.csv": b"\xef\xbb\xbf" + WIDE.replace(",", ";").replace("\n", "\r\n").encode(),
    "windows.csv": WIDE.replace("ward/", "C:\\data\\ward\\"),
}


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


FORMS["wide.parquet"] = parquet(file=["a", "b", "c"], Effusion=[True, True, False], Mass=[0.0, 1.0, 0.0])
FORMS["lists.parquet"] = parquet(file=["a", "b", "c"], labels=[["Effusion"], ["Effusion", "Mass"], ["normal"]])
FORMS["nulls.parquet"] = parquet(file=["a", "b", "c"], labels=[["Effusion", None], ["Mass", "Effusion"], ["normal"]])


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return write(tmp_path / "archive", {}, IMAGES)


def given(archive: str, content: str | bytes, name: str = "labels.csv", **options: Any) -> Manifest:
    """The manifest with a table of labels."""
    location = Path(archive).parent / name
    location.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_manifest(archive, labeling=Labeling(labels=str(location), **options))


def labels(manifest: Manifest, *findings: str) -> dict[str, list[int]]:
    """The labels of each image, in the order of `findings`."""
    order = [manifest.findings.index(finding) for finding in findings or manifest.findings]
    rows = manifest.table.select([schema.IMAGE_ID, schema.LABELS]).to_pylist()
    return {row[schema.IMAGE_ID]: [row[schema.LABELS][number] for number in order] for row in rows}


def column(manifest: Manifest, name: str) -> dict[str, Any]:
    return dict(zip(*(manifest.table[each].to_pylist() for each in (schema.IMAGE_ID, name)), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_labels(archive: str, name: str) -> None:
    manifest = given(archive, FORMS[name], name)
    assert sorted(finding.lower() for finding in manifest.findings) == ["effusion", "mass"]
    found = {finding.lower(): finding for finding in manifest.findings}
    assert labels(manifest, found["effusion"], found["mass"]) == LABELS
    assert manifest.table.schema.equals(schema.MANIFEST)
    manifest.table.validate(full=True)


def test_notes_say_what_was_matched(archive: str) -> None:
    manifest = given(archive, WIDE + "x,0,0\ny,1,-1\n")
    assert manifest.notes[1:] == [
        "labels from labels.csv: 3 of 4 images",
        "skipped, because labels.csv has no row for them: 1 image (for example ward/d.jpeg)",
        "in labels.csv, but not in the archive: 2 images (for example row 5, row 6)",
        "images by split: train 2, val 1, test 0",
        "images with positive/negative/unknown label: Effusion 2/1/0, Mass 1/2/0",
    ]


def test_findings_are_in_the_order_of_the_table_and_other_columns_are_named(archive: str) -> None:
    manifest = given(archive, "file,Zebra,remark,Apple,Count\na,1,good,0,17\nb,,,1,4\n")
    assert manifest.findings == ("Zebra", "Apple")
    assert "columns of labels.csv that are not used: remark, Count" in manifest.notes
    manifest = given(archive, "file,Zebra,Apple\na,1,0\n", label_columns=("apple",))
    assert (manifest.findings, labels(manifest)) == (("Apple",), {"ward/a.png": [0]})


def test_blanks_and_uncertain_labels(archive: str) -> None:
    table = "file,A,B\na,,-1\nb,1,0\n"
    unknown = schema.UNKNOWN
    assert labels(given(archive, table)) == {"ward/a.png": [unknown, unknown], "ward/b.dcm": [1, 0]}
    assert labels(given(archive, table, blank_as="negative"))["ward/a.png"] == [0, unknown]
    assert labels(given(archive, table, uncertain_as="positive"))["ward/a.png"] == [unknown, 1]
    assert labels(given(archive, table, uncertain_as="negative"))["ward/a.png"] == [unknown, 0]


def test_an_empty_list_is_unknown_unless_blank_is_negative(archive: str) -> None:
    table = "file,findings\na,\nb,Mass\n"
    manifest = given(archive, table)
    assert labels(manifest) == {"ward/a.png": [schema.UNKNOWN], "ward/b.dcm": [1]}
    assert any(note.startswith("without findings in labels.csv: 1 image") for note in manifest.notes)
    assert labels(given(archive, table, blank_as="negative")) == {"ward/a.png": [0], "ward/b.dcm": [1]}


def test_contradictory_rows_are_unknown(archive: str) -> None:
    manifest = given(archive, "file,A,B,sex\na,1,1,F\na.png,0,1,M\na,,,\nb,0,,F\n")
    assert labels(manifest)["ward/a.png"] == [schema.UNKNOWN, 1]
    assert column(manifest, schema.SEX) == {"ward/a.png": None, "ward/b.dcm": "F"}
    assert "contradictory rows in labels.csv: 1 image; the values that differ are unknown" in manifest.notes
    assert labels(given(archive, "file,labels\na,Mass|No finding\nb,Edema\n"))["ward/a.png"] == [schema.UNKNOWN, 0]


def test_no_finding_says_nothing_about_devices(archive: str) -> None:
    manifest = given(archive, "file,No Finding,Edema,Support Devices\na,1,,\nb,,1,1\n")
    assert manifest.findings == ("Edema", "Support Devices")
    assert labels(manifest)["ward/a.png"] == [0, schema.UNKNOWN]


def test_details_are_read(archive: str) -> None:
    header = "file,View Position,Gender,Age,StudyInstanceUID,study_date,Mass\n"
    manifest = given(archive, header + "a,pa,female,63.5,1.2,20200101,1\nb,LL,m,071Y,1.3,,0\nc,skyline,?,300,,,0\n")
    found = [tuple(column(manifest, name).values()) for name in (schema.VIEW, schema.SEX, schema.AGE_YEARS)]
    assert found == [("PA", "LL", None), ("F", "M", None), (63.5, 71, None)]
    assert column(manifest, schema.STUDY_ID) == {"ward/a.png": "1.2", "ward/b.dcm": "1.3", "ward/c.PNG": None}


# ---- Names of images


def test_paths_tell_images_with_the_same_name_apart(tmp_path: Path) -> None:
    archive = write(
        tmp_path / "archive", {}, ("p1/s1/view.png", "p1/s2/view.png", "p2/s1/view.png", "p3/s9/view.png")
    )
    rows = "other/place/p1/s1/view.jpg,1\np1/s2/view.png,0\np2\\s1\\view.png,1\nview.png,1\np4/s9/view.png,1\n"
    manifest = given(archive, f"path,Mass\n{rows}")
    assert labels(manifest) == {"p1/s1/view.png": [1], "p1/s2/view.png": [0], "p2/s1/view.png": [1]}
    assert any(note.endswith("others share: 1 (use their paths in labels.csv)") for note in manifest.notes)


def test_ids_that_are_not_file_names_match(tmp_path: Path) -> None:
    archive = write(tmp_path / "archive", {}, ("00001.dcm", "00002.dcm"))
    manifest = open_manifest(archive)
    ids = pa.array(["1.2.840.1", "1.2.840.2"])
    table = manifest.table.set_column(0, manifest.table.schema.field(0), ids)
    location = tmp_path / "labels.csv"
    location.write_text("SOPInstanceUID,Mass\n1.2.840.2,1\n")
    found = with_label_table(Manifest(table, ()), Labeling(labels=str(location)))
    assert labels(found) == {"1.2.840.2": [1]}


# ---- Patients and splits


def many(tmp_path: Path, count: int = 60) -> tuple[str, list[str]]:
    images = [f"{number:02d}.png" for number in range(count)]
    return write(tmp_path / "archive", {}, images), images


def test_patients_of_the_table_are_in_one_split(tmp_path: Path) -> None:
    archive, images = many(tmp_path)
    rows = "".join(f"{image},{number // 4},{number % 2}\n" for number, image in enumerate(images))
    manifest = given(archive, f"file,PatientID,Mass\n{rows}")
    assert "patients from labels.csv, not from the archive: 15" in manifest.notes
    splits: dict[str, set[str]] = {}
    for row in manifest.table.to_pylist():
        splits.setdefault(row[schema.PATIENT_ID], set()).add(row[schema.SPLIT])
    assert len(splits) == 15
    assert all(len(of_patient) == 1 for of_patient in splits.values())
    assert {"train", "val"} <= set.union(*splits.values())
    own = given(archive, f"file,PatientID,Mass\n{rows}", patient_column="none")
    assert column(own, schema.PATIENT_ID) == {image: image for image in images}


def test_a_split_column_overrides(tmp_path: Path) -> None:
    archive, images = many(tmp_path)
    names = ("Training", "validation", "TEST", "")
    patients = [number // 15 * 100 + number % 15 // 3 for number in range(len(images))]
    rows = "".join(f"{image},{patients[at]},{names[at // 15]},1\n" for at, image in enumerate(images))
    manifest = given(archive, f"file,patient,split,Mass\n{rows}")
    splits = list(column(manifest, schema.SPLIT).values())
    assert splits[:45] == ["train"] * 15 + ["val"] * 15 + ["test"] * 15
    assert set(splits[45:]) <= set(schema.SPLITS)


def test_a_patient_in_two_splits_is_an_error(archive: str) -> None:
    table = "file,patient,split,Mass\na,7,train,1\nb,7,test,1\nc,8,val,0\n"
    with pytest.raises(UserError, match=r"each patient in one split, got 1 patient in several .*--split-column none"):
        given(archive, table)
    splits = column(given(archive, table, split_column="none"), schema.SPLIT)
    assert splits["ward/a.png"] == splits["ward/b.dcm"]


def test_splits_that_contradict_the_folders_are_noted(tmp_path: Path) -> None:
    archive = write(tmp_path / "archive", {}, ("all/day/a.png", "all/day/b.png", "all/day/c.png"))
    manifest = given(archive, "file,split,Mass\na,train,1\nb,test,1\nc,val,0\n")
    assert list(column(manifest, schema.SPLIT).values()) == ["train", "test", "val"]
    assert any("they divide the images of 1 patient" in note for note in manifest.notes)


def test_official_splits_remain_unless_patients_contradict_them(tmp_path: Path) -> None:
    names = [f"{number:08d}_{image:03d}.png" for number in range(30) for image in range(2)]
    entries = "".join(f"{name},Mass,{int(name[:8])},PA\n" for name in names)
    lists = {
        "Data_Entry_2017.csv": f"Image Index,Finding Labels,Patient ID,View Position\n{entries}",
        "test_list.txt": "\n".join(names[40:]),
        "train_val_list.txt": "\n".join(names[:40]),
    }
    archive = write(tmp_path / "archive", lists, (f"images/{name}" for name in names))
    official = column(read_chestxray14(archive), schema.SPLIT)
    rows = "".join(f"{name},{name[:8]},1\n" for name in names)
    assert column(given(archive, f"file,patient,Edema\n{rows}"), schema.SPLIT) == official
    others = "".join(f"{name},{number % 20},1\n" for number, name in enumerate(names))
    manifest = given(archive, f"file,patient,Edema\n{others}")
    assert any(note.startswith("the archive's own splits are not used") for note in manifest.notes)


# ---- Mappings


MAPPING = """findings: {Mass: Nodule/Mass, NODULE: Nodule/Mass}
ignore: [Devices]
no_finding: [unremarkable]
uncertain_as: {Edema: positive}
"""


@pytest.mark.parametrize("text", [MAPPING, json.dumps(yaml.safe_load(MAPPING))], ids=["yaml", "json"])
def test_a_mapping_renames_merges_and_ignores(archive: str, text: str) -> None:
    location = Path(archive).parent / "mapping"
    location.write_text(text)
    wide = "file,Mass,Devices,Nodule,Edema\na,0,1,1,-1\nb,0,0,,0\nc,-1,,0,\nd,0,,0,1\n"
    manifest = given(archive, wide, label_mapping=str(location))
    assert manifest.findings == ("Nodule/Mass", "Edema")
    assert list(labels(manifest).values()) == [[1, 1], [-1, 0], [-1, -1], [0, 1]]
    lists = "file,labels\na,nodule|Devices\nb,unremarkable\nc,Devices|Edema\n"
    manifest = given(archive, lists, label_mapping=str(location))
    assert manifest.findings == ("Nodule/Mass", "Edema")
    assert list(labels(manifest).values()) == [[1, 0], [0, 0], [0, 1]]


def test_a_mapping_applies_to_the_labels_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("findings: {Mass: Nodule/Mass, Nodule: Nodule/Mass}\nignore: [Hernia]\n")
    entries = "Image Index,Finding Labels,Patient ID,View Position\n1_000.png,Mass,1,PA\n2_000.png,Edema,2,PA\n"
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n1_000.png,Mass,1,2,30,40\n"
    lists = {"Data_Entry_2017.csv": entries, "BBox_List_2017.csv": boxes}
    archive = write(tmp_path / "archive", lists, ("images/1_000.png", "images/2_000.png"))
    manifest = open_manifest(archive, labeling=Labeling(label_mapping=str(tmp_path / "map.yaml")))
    others = [finding for finding in schema.FINDINGS if finding not in ("Mass", "Nodule", "Hernia")]
    assert manifest.findings == (*others[:4], "Nodule/Mass", *others[4:])
    assert labels(manifest, "Nodule/Mass", "Edema") == {"1_000.png": [1, 0], "2_000.png": [0, 1]}
    (box,) = column(manifest, schema.BOXES)["1_000.png"]
    assert box[schema.LABEL] == "Nodule/Mass"


@pytest.mark.parametrize(("policy", "label"), [("unknown", -1), ("negative", 0), ("positive", 1)])
def test_a_policy_applies_to_uncertain_labels_of_a_source(tmp_path: Path, policy: Any, label: int) -> None:
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"
    header += "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
    header += "Fracture,Support Devices\n"
    image = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    other = f"{image.replace('1', '2')},Male,60,Frontal,PA,,1.0,,,,1.0,,,,,,,,\n"
    lists = {"train.csv": f"{header}{image},Male,60,Frontal,PA,,,-1.0,1.0,,,,,,,,,,\n{other}"}
    archive = write(tmp_path / "CheXpert-v1.0-small", lists, (image.partition("/")[2],))
    for labeling in (Labeling(uncertain_as=policy), Labeling(labels=f"{archive}/train.csv", uncertain_as=policy)):
        manifest = open_manifest(archive, labeling=labeling)
        assert list(labels(manifest, "Cardiomegaly", "Lung Opacity", "Edema").values()) == [[label, 1, -1]]


def test_boxes_may_replace_the_labels_of_a_source_with_uncertain_ones(tmp_path: Path) -> None:
    findings = [*labeler.COLUMNS]
    values = ["-1.0" if finding == "Cardiomegaly" else "" for finding in findings]
    image = "train/patient00001/study1/view1_frontal.jpg"
    header = ",".join(["Path,Sex,Age,Frontal/Lateral,AP/PA", *findings])
    table = f"{header}\n{image},Male,60,Frontal,PA,{','.join(values)}\n"
    archive = write(tmp_path / "archive", {"train.csv": table}, (image,))
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"image_id,class_name,x_min,y_min,x_max,y_max\n{image},Nodule,1,1,10,10\n")
    manifest = open_manifest(archive, labeling=Labeling(boxes=str(boxes), uncertain_as="positive"))
    assert list(labels(manifest, "Nodule").values()) == [[1]]


def test_policies_and_mappings_need_labels(archive: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("findings: {Mass: Nodule}\n")
    for labeling in (Labeling(uncertain_as="negative"), Labeling(label_mapping=str(tmp_path / "map.yaml"))):
        with pytest.raises(UserError, match=r"expected an archive with labels for .* got one without: add --labels"):
            open_manifest(archive, labeling=labeling)


# ---- Mistakes

MANY_WORDS = "file,words\n" + "".join(f"a,word {number}\n" for number in range(1001))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("x,Mass\na,1\n", {}, r"expected a column with the images' names, got x, Mass: name it with --image-column"),
        (WIDE, {"image_column": "picture"}, r"expected the column 'picture', got file, .*: correct --image"),
        (WIDE, {"label_columns": ("Edema",)}, r"expected the column 'Edema', got file, .*: correct --label-columns"),
        ("file,remark\na,good\nb,bad\n", {}, r"expected columns with 1, 0, -1 or blank, .*--label-columns"),
        ("file,Mass\na,1\nb,0\nc,maybe\n", {}, r"row 4: expected 1, 0, -1 or blank in .* Mass, got 'maybe'"),
        ("file,Mass\na,0.3\n", {"label_columns": ("Mass", "file")}, r"row 2: expected 1, 0, -1 or blank"),
        ("file,Mass\n,1\n", {}, r"row 2: expected an image in the column file, got ''"),
        (
            "file,Mass\nq/zz.png,1\n",
            {},
            r"expected labels of the archive's 4 images, such as 'ward/a.png', got .* 1 image, such as 'q/zz': use",
        ),
        (
            "file,split,Mass\na,holdout,1\n",
            {},
            r"row 2: expected train, val or test in the column split, got 'holdout'",
        ),
        ("file,patient,Mass\na,1,1\na,2,1\n", {}, r"row 3: expected the same patient as in row 2 for the same image"),
        ("file,Mass\n", {}, r"expected a header and rows"),
        ("file,Mass\na,1,1\n", {}, r"labels.csv, line 2: expected 2 fields, as in the header, got 3"),
        (b"PK\x03\x04rest", {}, r"expected CSV, TSV or Parquet, got an Excel workbook: save it as CSV \(UTF-8\)"),
        (b"PAR1rest", {}, r"expected a Parquet table, got an error"),
        (
            "file,Mass\na,1\n",
            {"value_column": "Mass"},
            r"expected a column with the names of findings for --value-column",
        ),
        (MANY_WORDS, {"label_columns": ("words",)}, r"expected at most 1,000 findings, got 1,001"),
    ],
)
def test_mistakes_are_one_line(archive: str, table: str | bytes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        given(archive, table, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "finding: {}",
            r"expected some of the keys .*, uncertain_as, got finding: use these keys",
        ),
        ("- a", r"expected some of the keys findings, .*, got list"),
        ("a: [", r"expected a YAML or JSON file, got an error"),
        ("findings: [Mass]", r"expected a mapping in findings, got"),
        ("ignore: Mass", r"expected a list of names in ignore, got 'Mass'"),
        (
            "uncertain_as: {Mass: maybe}",
            r"expected unknown, negative, positive for 'Mass', got 'maybe': use one of these words in uncertain_as",
        ),
        (
            "ignore: [Mass]\nfindings: {mass: Nodule}",
            r"expected each name in only one of findings, .*, got 'mass' in two",
        ),
        ("ignore: [Mass, Effusion]", r"expected findings, got none that are not ignored"),
    ],
)
def test_mistakes_in_mappings_are_one_line(archive: str, text: str, message: str) -> None:
    location = Path(archive).parent / "map.yaml"
    location.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        given(archive, WIDE, label_mapping=str(location))
    assert "\n" not in str(raised.value)


def test_dependent_options_are_checked() -> None:
    with pytest.raises(UserError, match="expected --labels with --image-column, got none"):
        Labeling(image_column="file")
    with pytest.raises(UserError, match="expected --labels or --min-readers, got both"):
        Labeling(labels="a.csv", min_readers=2)
    assert Labeling(labels="/a.csv", label_columns=("A", "B")).describe() == {
        "labels": "/a.csv",
        "label_columns": ("A", "B"),
    }


def test_a_long_table_is_matched_in_any_order(tmp_path: Path) -> None:
    archive, images = many(tmp_path, 2000)
    value = np.random.default_rng(0).integers(0, 2, len(images))
    order = np.random.default_rng(1).permutation(len(images))
    rows = "".join(f"{images[number]},{value[number]}\n" for number in order)
    found = labels(given(archive, f"file,Mass\n{rows}"))
    assert [found[image][0] for image in images] == value.tolist()
