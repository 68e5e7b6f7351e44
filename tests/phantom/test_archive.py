"""A phantom archive has ChestX-ray14's layout and correct ground truth, and is reproducible."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.phantom.archive import make_exam, patient_of, write_phantom
from cxr.phantom.findings import sample_findings
from cxr.phantom.preview import contact_sheet
from cxr.sources import open_manifest, rle

COUNT, SIZE = 24, 128


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(str(folder), COUNT, size=SIZE, seed=7)
    return folder


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))[1:]


def test_lists_name_each_image_once_and_split_by_patient(archive: Path) -> None:
    images = {path.name for path in (archive / "images").iterdir()}
    assert len(images) == COUNT
    entries = rows_of(archive / "Data_Entry_2017_v2020.csv")
    assert sorted(row[0] for row in entries) == sorted(images)
    train, test = ((archive / name).read_text().split() for name in ("train_val_list.txt", "test_list.txt"))
    assert sorted(train + test) == sorted(images)
    assert test
    assert not {name[:8] for name in train} & {name[:8] for name in test}


def test_headers_are_the_published_ones(archive: Path, real_data: Path) -> None:
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        published = (real_data / "chestxray14" / name).read_text().splitlines()[0]
        assert (archive / name).read_text().splitlines()[0] == published


def test_truth_labels_and_boxes_agree(archive: Path) -> None:
    labels = {row[0]: row[1] for row in rows_of(archive / "Data_Entry_2017_v2020.csv")}
    boxes: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in labels}
    for name, label, *xywh in rows_of(archive / "BBox_List_2017.csv"):
        boxes[name].append((label.replace("Infiltrate", "Infiltration"), np.array(xywh, float)))
    for row in pq.read_table(archive / "truth.parquet").to_pylist():
        name = row[schema.IMAGE_ID]
        masks = {m[schema.LABEL]: rle.decode(m[schema.MASK_RLE], SIZE, SIZE) for m in row[schema.MASKS]}
        assert masks.pop(schema.LUNGS).any()
        assert ("|".join(masks) or "No Finding") == labels[name]
        assert {label for label, _ in boxes[name]} == set(masks)
        for label, (x, y, width, height) in boxes[name]:
            x, y, width, height = (round(v * SIZE / 1024) for v in (x, y, width, height))  # frame of 1024 px
            inside = masks[label][y : y + height, x : x + width]
            assert inside.shape == (height, width)
            assert inside[0].any()
            assert inside[:, -1].any()


def test_source_reads_it(archive: Path) -> None:
    manifest = open_manifest(str(archive))
    assert manifest.table.num_rows == COUNT
    exam = make_exam(5, size=SIZE, seed=7)
    rows = {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}
    row = rows[exam.image_id]
    assert (
        tuple(f for f, on in zip(schema.FINDINGS, row[schema.LABELS], strict=True) if on == 1) == exam.phantom.labels
    )
    np.testing.assert_allclose(row[schema.TRUE_THETA], exam.phantom.pose_unit.reshape(-1), rtol=1e-6)
    assert {mask[schema.LABEL] for mask in row[schema.MASKS]} == set(exam.phantom.masks)
    assert row[schema.SPLIT] == "test" if exam.is_test else row[schema.SPLIT] in ("train", "val")
    assert sum(len(row[schema.BOXES] or []) for row in rows.values()) > COUNT / 2


def test_an_image_depends_only_on_seed_and_index(archive: Path) -> None:
    exam = make_exam(11, size=SIZE, seed=7)
    written = cv2.imread(str(archive / "images" / exam.image_id), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(written, exam.phantom.pixels)
    assert (make_exam(11, size=SIZE, seed=8).phantom.pixels != exam.phantom.pixels).any()


def test_follow_ups_have_the_same_anatomy_in_another_pose() -> None:
    patients = [patient_of(index, 0) for index in range(400)]
    assert len(set(patients)) == 400
    counts = Counter(patient for patient, _ in patients)
    assert set(counts.values()) == {1, 2, 3, 4}
    assert all(follow_up < counts[patient] for patient, follow_up in patients)
    index = next(i for i in range(400) if patients[i][1] == 1)
    first, second = (make_exam(i, size=64, prevalence=0.0) for i in (index - 1, index))
    assert (first.patient, first.sex) == (second.patient, second.sex)
    assert np.abs(first.phantom.pose_unit - second.phantom.pose_unit).max() > 1e-3


def test_findings_have_the_expected_frequency_and_co_occurrence() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_findings(rng) for _ in range(6000)]
    assert np.mean([not findings for findings in drawn]) == pytest.approx(0.5, abs=0.03)
    share = {f: np.mean([f in findings for findings in drawn]) for f in schema.FINDINGS}
    assert min(share.values()) > 0.005
    assert share["Infiltration"] > share["Edema"] > share["Hernia"]
    both = np.mean(["Emphysema" in findings and "Pneumothorax" in findings for findings in drawn])
    strangers = np.mean(["Emphysema" in findings and "Nodule" in findings for findings in drawn])
    assert both > 2 * strangers
    assert {len(findings) for findings in drawn} >= {0, 1, 2, 3}
    assert all(set(findings) <= {"Mass", "Hernia"} for findings in
               (sample_findings(rng, ("Mass", "Hernia"), 1.0) for _ in range(50)))  # fmt: skip


def test_contact_sheet_shows_the_boxes() -> None:
    exam = next(s for s in (make_exam(i, size=SIZE) for i in range(20)) if s.phantom.boxes)
    sheet = contact_sheet([exam] * 3, columns=2)
    assert sheet.shape == (768, 768, 3)
    assert (sheet[..., 0] != sheet[..., 2]).any()


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 8}, {"prevalence": 1.5}, {"findings": ["Fracture"]}])
def test_settings_out_of_range_are_rejected(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_phantom(str(tmp_path), **{"count": 1, "size": 64, **wrong})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
