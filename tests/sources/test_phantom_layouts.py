"""Phantoms in the layouts of the large public archives: made, listed, decoded, with the labels that they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr import schema
from cxr.data.decode import make_rows
from cxr.phantom.archive import Exam
from cxr.phantom.report_labels import OBSERVATIONS, WORDS, write_report_phantom
from cxr.phantom.rsna import OPACITIES, image_id, write_rsna_phantom
from cxr.phantom.vinbigdata import CLASSES, exact, write_vinbigdata_phantom
from cxr.phantom.vinbigdata import image_id as vindr_image_id
from cxr.schema import PixelFormat
from cxr.sources import find_source, labeler, padchest_words
from tests.sources.archives import findings, read

COUNT, SIZE = 12, 64
PIXELS = PixelFormat(SIZE)


def made(write: Callable[..., None], folder: Path, **settings: Any) -> tuple[Any, list[dict[str, Any]], list[Exam]]:
    """The manifest, the decoded rows by true pose, and the exams, in the same order."""
    exams: list[Exam] = []
    write(str(folder), COUNT, size=SIZE, on_exam=exams.append, **settings)
    manifest, _ = read(str(folder))
    rows = make_rows(manifest.table, PIXELS, threads=1).to_pylist()
    by_pose = {tuple(row[schema.TRUE_THETA]): row for row in rows}
    poses = [tuple(exam.phantom.pose_unit.astype(np.float32).reshape(-1).tolist()) for exam in exams]
    return manifest, [by_pose[pose] for pose in poses], exams


def assert_is_the_exam(row: dict[str, Any], exam: Exam) -> None:
    assert row[schema.ERROR] is None
    pixels = np.frombuffer(row[schema.PIXELS], np.uint8)
    assert np.corrcoef(pixels, exam.phantom.pixels.ravel())[0, 1] > 0.99
    assert row[schema.VIEW] == exam.view
    assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == (SIZE, SIZE)


@pytest.mark.parametrize("layout", ["chexpert", "mimic-cxr-jpg", "padchest"])
def test_labels_of_reports(layout: str, tmp_path: Path) -> None:
    manifest, rows, exams = made(write_report_phantom, tmp_path, layout=layout)
    assert find_source(str(tmp_path)).name == layout
    uncertain, unknown = 0, 0
    for row, exam in zip(rows, exams, strict=True):
        assert_is_the_exam(row, exam)
        extra = json.loads(row[schema.EXTRA] or "{}")
        positive, negative = findings(manifest, row), findings(manifest, row, schema.NEGATIVE)
        if layout == "padchest":
            words = [WORDS[finding] for finding in exam.phantom.labels]
            assert positive == {f for word in words for f in padchest_words.WORDS[padchest_words.word_key(word)]}
            assert positive | negative == set(padchest_words.FINDINGS)
        else:
            present = {OBSERVATIONS[finding] for finding in exam.phantom.labels}
            doubted = set(filter(None, extra.get(labeler.UNCERTAIN, "").split("|")))
            assert positive | doubted == present
            assert not negative & present
            assert present or negative >= set(labeler.FINDINGS) - {"Support Devices"}
            uncertain += len(doubted)
            unknown += len(set(labeler.FINDINGS) - positive - negative)
        if layout != "mimic-cxr-jpg":
            assert (row[schema.SEX], row[schema.AGE_YEARS]) == (exam.sex, exam.age)
    if layout != "padchest":
        assert 0 < uncertain < unknown
    patients = {row[schema.PATIENT_ID] for row in rows}
    assert len(patients) == len({exam.patient for exam in exams}) < COUNT
    assert len({(row[schema.PATIENT_ID], row[schema.SPLIT]) for row in rows}) == len(patients)
    if layout != "padchest":  # its splits are a hash
        assert all((row[schema.SPLIT] == "test") == exam.is_test for row, exam in zip(rows, exams, strict=True))


def test_a_truncated_padchest_file_is_a_row_with_the_reason(tmp_path: Path) -> None:
    write_report_phantom(str(tmp_path), 2, "padchest", size=SIZE)
    path = min(tmp_path.glob("0/*.png"))
    assert Image.open(path).mode == "I;16"
    path.write_bytes(path.read_bytes()[:-100])
    rows = make_rows(read(str(tmp_path))[0].table, PIXELS, threads=1).to_pylist()
    assert [row[schema.ERROR] and "truncated PNG" in row[schema.ERROR] for row in rows] == [True, None]


def test_rsna_boxes_and_patients(tmp_path: Path) -> None:
    _, rows, exams = made(write_rsna_phantom, tmp_path)
    assert find_source(str(tmp_path)).name == "rsna-pneumonia"
    for index, (row, exam) in enumerate(zip(rows, exams, strict=True)):
        assert_is_the_exam(row, exam)
        assert (row[schema.IMAGE_ID], row[schema.PATIENT_ID]) == (image_id(index, 0), str(exam.patient))
        truth = [box.xyxy_px for box in exam.phantom.boxes if box.label in OPACITIES]
        if exam.is_test:
            assert (row[schema.LABELS], row[schema.BOXES], row[schema.SPLIT]) == ([-1], None, "test")
            continue
        assert row[schema.LABELS] == [int(bool(truth))]
        corners = [[box[name] for name in ("x_min", "y_min", "x_max", "y_max")] for box in row[schema.BOXES]]
        np.testing.assert_allclose(np.reshape(corners, (-1, 4)), np.reshape(truth, (-1, 4)), atol=1e-3)
    assert {exam.is_test for exam in exams} == {True, False}
    assert len({row[schema.PATIENT_ID] for row in rows}) < COUNT


def test_vindr_lists_of_readers_and_of_the_consensus(tmp_path: Path) -> None:
    manifest, rows, exams = made(write_vinbigdata_phantom, tmp_path, layout="vindr-cxr", prevalence=0.8)
    assert find_source(str(tmp_path)).name == "vindr-cxr"
    assert manifest.findings == (*schema.VINDR_LOCAL_FINDINGS, *schema.VINDR_GLOBAL_FINDINGS)
    for index, (row, exam) in enumerate(zip(rows, exams, strict=True)):
        assert row[schema.ERROR] is None
        assert row[schema.IMAGE_ID] == vindr_image_id(index, 0)
        assert (row[schema.SPLIT] == "test") == exam.is_test
        assert ("Pneumonia" in findings(manifest, row)) == ("Pneumonia" in exam.phantom.labels)
        readers = {box[schema.READER] for box in row[schema.BOXES]}
        if exam.is_test:
            assert findings(manifest, row) - {"Pneumonia"} == {CLASSES[box.label] for box in exam.phantom.boxes}
            assert [box[schema.LABEL] for box in row[schema.BOXES]] == [name for name, _ in exact(exam)]
            assert readers <= {None}
        else:
            assert len(json.loads(row[schema.EXTRA])["readers"]) == 3 >= len(readers)
            assert None not in readers
