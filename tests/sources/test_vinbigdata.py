"""VinBigData: both releases, all readers' boxes, originals of another size, and the complete published list."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom import dcmread

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.phantom.archive import make_exam
from cxr.phantom.vinbigdata import Layout, exact, image_id, read_by_three, write_vinbigdata_phantom
from cxr.schema import PixelFormat
from cxr.sources import find_source, image_files, open_manifest, rater_agreement, vinbigdata
from cxr.sources.annotations import HEADER
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling, ReadOptions
from cxr.storage import FileEntry
from tests.reader_agreement import pair_f1

COUNT, SIZE = 12, 64
PIXELS = PixelFormat(SIZE)
CSV_HEADER = ",".join(HEADER) + "\n"
BOTH = pytest.mark.parametrize("layout", ["vinbigdata", "vinbigdata-png"])


@pytest.fixture
def archive(tmp_path: Path, layout: Layout) -> Path:
    write_vinbigdata_phantom(str(tmp_path), COUNT, layout, size=SIZE, prevalence=0.8)
    return tmp_path


def read(archive: Path) -> tuple[Manifest, dict[str, dict]]:
    manifest = open_manifest(str(archive))
    return manifest, {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def write(folder: Path, rows: str, images: str = "abc") -> None:
    """Images a to c, 40 x 20, in train/, and their rows in train.csv."""
    (folder / "train").mkdir()
    (folder / "train.csv").write_text(CSV_HEADER + rows)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40), np.uint8)
    for each in images:
        assert cv2.imwrite(str(folder / "train" / f"{each}.png"), pixels)


@BOTH
def test_a_phantom_archive_is_read_with_all_readers_boxes(archive: Path, layout: Layout) -> None:
    assert find_source(str(archive)).name == "vinbigdata"
    manifest, given = read(archive)
    assert manifest.findings == schema.VINBIGDATA_FINDINGS
    assert manifest.table.schema.equals(schema.MANIFEST)
    rows = {row[schema.IMAGE_ID]: row for row in make_rows(manifest.table, PIXELS, threads=1).to_pylist()}
    scale = 1 if layout == "vinbigdata" else 0.5
    drawn, testing = 0, 0
    for index in range(COUNT):
        row, exam = rows[image_id(index, 0)], make_exam(index, size=SIZE, prevalence=0.8)
        assert (row[schema.ERROR], row[schema.HEIGHT_PX]) == (None, SIZE * scale)
        pixels = np.frombuffer(row[schema.PIXELS], np.uint8)
        assert np.corrcoef(pixels, exam.phantom.pixels.ravel())[0, 1] > 0.97
        if exam.is_test:
            testing += 1
            assert (row[schema.SPLIT], row[schema.BOXES], set(row[schema.LABELS])) == ("test", None, {-1})
            continue
        wanted = [each for each in read_by_three(exam) if each[2] != 14]
        assert [(box["label"], box["reader"]) for box in row[schema.BOXES]] == [(each[1], each[3]) for each in wanted]
        corners = [[box[corner] for corner in rater_agreement.CORNERS] for box in row[schema.BOXES]]
        np.testing.assert_allclose(corners, [[scale * edge for edge in each[4:]] for each in wanted])
        shown = {schema.VINBIGDATA_FINDINGS[number] for number, label in enumerate(row[schema.LABELS]) if label == 1}
        assert shown == {each[1] for each in wanted}
        assert len(set(json.loads(given[image_id(index, 0)][schema.EXTRA])["readers"])) == 3
        drawn += len(wanted)
    assert drawn > 5
    assert testing > 0


@BOTH
def test_exact_boxes_can_be_given_as_a_file(archive: Path, layout: Layout) -> None:
    truth = open_manifest(str(archive), labeling=Labeling(boxes=str(archive / "truth.csv")))
    boxes = {row[schema.IMAGE_ID]: row[schema.BOXES] for row in truth.table.to_pylist()}
    for index in range(COUNT):
        wanted = exact(make_exam(index, size=SIZE, prevalence=0.8))
        found = [
            (box["label"], tuple(box[corner] for corner in rater_agreement.CORNERS))
            for box in boxes[image_id(index, 0)]
        ]
        assert found == wanted


def test_boxes_of_resized_copies_are_scaled(tmp_path: Path) -> None:
    rows = "a,ILD,5,R1,100,200,300,400\nb,ILD,5,R1,10,5,20,10\nc,No finding,14,R1,,,,\n"
    write(tmp_path, rows)
    (tmp_path / "train_meta.csv").write_text("image_id,dim0,dim1\na,400,400\n")
    manifest, given = read(tmp_path)
    assert [given[each][schema.BOXES_FRAME] for each in "abc"] == [[400, 400], None, None]
    a, b, c = (row[schema.BOXES] for row in make_rows(manifest.table, PIXELS, threads=1).to_pylist())
    corners = [[box[corner] for corner in rater_agreement.CORNERS] for box in (*a, *b)]
    np.testing.assert_allclose(corners, [[10, 10, 30, 20], [10, 5, 20, 10]])
    assert c == []
    note = (
        "boxes read as pixels of the files, because no table such as train_meta.csv gives the originals' sizes: "
        "1 image"
    )
    assert any(each.startswith(note) for each in manifest.notes)


@pytest.mark.parametrize("file", ["train_meta.csv", "train.csv", "test.csv"])
def test_sizes_come_from_any_list_in_any_format(file: str, tmp_path: Path) -> None:
    """Names may have a suffix, and numbers a decimal point, as in public copies of 256 to 1024 pixels."""
    write(tmp_path, "a,ILD,5,R1,100,200,300,400\n")
    sizes = "image_id,width,height\na.png,800.0,400\n"
    if file == "train_meta.csv":
        sizes = "image_id,dim0,dim1\na.PNG,400.0,800\n"
    elif file == "train.csv":
        sizes = CSV_HEADER.replace("\n", ",width,height\n") + "a,ILD,5,R1,100,200,300,400,800.0,400.0\n"
    (tmp_path / file).write_text(sizes)
    manifest, given = read(tmp_path)
    assert (given["a"][schema.BOXES_FRAME], given["b"][schema.BOXES_FRAME]) == ([400, 800], None)
    (box,) = make_rows(manifest.table, PIXELS, threads=1).to_pylist()[0][schema.BOXES]
    assert [box[corner] for corner in rater_agreement.CORNERS] == [5, 10, 15, 20]
    assert not any("originals' size" in note for note in manifest.notes)


def test_boxes_outside_the_size_in_a_table_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "".join(f"a,ILD,5,R{reader},100,200,300,400\n" for reader in range(4)))
    (tmp_path / "train_meta.csv").write_text("image_id,dim0,dim1\na,20,40\n")
    with pytest.raises(UserError, match="got 4 of 4 boxes outside"):
        open_manifest(str(tmp_path))


def test_no_boxes_differ_from_unknown_and_unlisted_images_are_test_images(tmp_path: Path) -> None:
    write(tmp_path, "a,No finding,14,R1,,,,\na,ILD,5,R2,1,2,3,4\nz,No finding,14,R1,,,,\nb,No finding,14,R9,,,,\n")
    manifest, rows = read(tmp_path)
    assert [len(rows["a"][schema.BOXES]), rows["b"][schema.BOXES], rows["c"][schema.BOXES]] == [1, [], None]
    assert [sum(rows[each][schema.LABELS]) for each in "abc"] == [1, 0, -14]
    assert rows["c"][schema.SPLIT] == "test"
    assert json.loads(rows["a"][schema.EXTRA]) == {"readers": ["R1", "R2"]}
    assert "missing from the archive: 1 of 3 images listed in train.csv; continuing with 3 images" in manifest.notes
    assert "not listed in train.csv, so findings are unknown: 1 image" in manifest.notes


def test_the_file_name_alone_does_not_make_this_layout(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,label\n")
    assert not vinbigdata.detect(str(tmp_path))
    (tmp_path / "train.csv").write_text(CSV_HEADER)
    assert vinbigdata.detect(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "trouble"),
    [
        ({"a.png": ""}, "expected train.csv in"),
        ({"train.csv": CSV_HEADER}, "expected X-rays in"),
        (
            {"train.csv": CSV_HEADER, "a.png": "", "train_meta.csv": "image_id,dim0,dim1\na,9,x\n"},
            "train_meta.csv, line 2: expected dim0 and dim1 as whole numbers of pixels from 1 to 65,535, got '9, x'",
        ),
        (
            {"train.csv": CSV_HEADER, "a.png": "", "train_meta.csv": "image_id\na\n"},
            "train_meta.csv: expected the columns dim0 and dim1 or height and width, got image_id",
        ),
    ],
)
def test_user_errors_say_what_was_expected(tmp_path: Path, files: dict[str, str], trouble: str) -> None:
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    with pytest.raises(UserError, match=trouble):
        open_manifest(str(tmp_path), ReadOptions(source="vinbigdata"))


@pytest.mark.slow
def test_the_published_boxes_with_all_images(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (real_data / "vinbigdata" / "train.csv").open() as file:
        published = list(csv.DictReader(file))
    names = sorted({line["image_id"] for line in published})
    entries = [FileEntry(f"{tmp_path}/{name}.dicom", f"train/{name}.dicom", 1) for name in names]
    monkeypatch.setattr(image_files, "list_files", lambda uri, *_: iter(entries))
    manifest = vinbigdata.manifest(str(real_data / "vinbigdata"))
    assert manifest.notes == []
    rows = manifest.table.to_pylist()
    looked = [json.loads(row[schema.EXTRA])["readers"] for row in rows]
    assert (len(published), len(rows), sum(row[schema.BOXES] == [] for row in rows)) == (67_914, 15_000, 10_606)
    assert {len(set(who)) for who in looked} == {3}
    assert len({reader for who in looked for reader in who}) == 17
    assert sum(len(row[schema.BOXES]) for row in rows) == sum(line["class_id"] != "14" for line in published)
    names = {int(line["class_id"]): line["class_name"] for line in published}
    assert tuple(names[number] for number in range(14)) == manifest.findings
    splits = Counter(row[schema.SPLIT] for row in rows)
    assert min(splits.values()) > 1_200
    read_by = [(row[schema.BOXES], who) for row, who in zip(rows, looked, strict=True)]
    agreement = pair_f1(read_by, manifest.findings)
    assert agreement.mean() == pytest.approx(0.409, abs=5e-4)
    assert agreement.argmax() == manifest.findings.index("Cardiomegaly")


# ---- The phantom's readers


@pytest.mark.slow
def test_simulated_readers_agree_like_radiologists() -> None:
    exams = [make_exam(index, size=64, seed=1, prevalence=1.0) for index in range(120)]
    drawn = [read_by_three(exam) for exam in exams]
    columns = (schema.LABEL, schema.READER, *rater_agreement.CORNERS)
    boxes = [[dict(zip(columns, (r[1], r[3], *r[4:]), strict=True)) for r in rows if r[2] != 14] for rows in drawn]
    looked = [sorted({str(row[3]) for row in rows}) for rows in drawn]
    assert {len(who) for who in looked} == {3}
    assert {reader for who in looked for reader in who} == {f"R{number}" for number in range(1, 18)}
    common = ("Cardiomegaly", "Infiltration", "Nodule/Mass", "Pleural effusion")
    told = pair_f1(zip(boxes, looked, strict=True), schema.VINBIGDATA_FINDINGS)
    assert 0.35 < np.mean([told[schema.VINBIGDATA_FINDINGS.index(name)] for name in common]) < 0.8
    assert sum(map(len, boxes)) < 0.95 * 3 * sum(len(exact(exam)) for exam in exams)


def test_a_larger_archive_starts_with_the_smaller_one(tmp_path: Path) -> None:
    for count in (3, 5):
        write_vinbigdata_phantom(str(tmp_path / str(count)), count, size=64, seed=3, prevalence=1.0)
    for path in (tmp_path / "3").rglob("*.dicom"):
        assert (tmp_path / "5" / path.relative_to(tmp_path / "3")).read_bytes() == path.read_bytes()
    smaller, larger = ((tmp_path / each / "train.csv").read_text() for each in ("3", "5"))
    assert larger.startswith(smaller)


def test_phantom_dicoms_have_no_patient_data_and_some_are_inverted(tmp_path: Path) -> None:
    write_vinbigdata_phantom(str(tmp_path), 3, size=64)
    files = [dcmread(path) for path in tmp_path.rglob("*.dicom")]
    assert {"PatientID", "PatientName", "PatientSex"}.isdisjoint(
        {element.keyword for file in files for element in file}
    )
    assert {file.PhotometricInterpretation for file in files} == {"MONOCHROME1", "MONOCHROME2"}


def test_phantom_settings_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected layout vinbigdata or vinbigdata-png"):
        write_vinbigdata_phantom(str(tmp_path), 1, "jsrt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prevalence"):
        write_vinbigdata_phantom(str(tmp_path), 1, prevalence=2)
