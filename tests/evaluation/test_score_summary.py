"""Runs over images without ground truth have a report: of the scores, of examples, and of failures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.run import ReportOptions
from cxr.sources import open_manifest, rle
from tests.by_family import by_family
from tests.made_shards import chest_like, write_shards
from tests.written_runs import set_settings, settings_of, write_scored

IMAGES, SIDE = 12, 64
FINDINGS = ("Mass", "Nodule", "Hernia")
BOX = {"label": "Mass", "x_min": 10.0, "y_min": 12.0, "x_max": 30.0, "y_max": 40.0}
FAMILIES = by_family(reports.REPORTS, quick={"attend", "lungs"})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """PNG files, one folder per patient, and nothing else."""
    rng = np.random.default_rng(0)
    for image in range(IMAGES):
        path = tmp_path / "unlabeled" / f"patient {image // 2}" / "study" / f"{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", chest_like(rng, SIDE))[1].tobytes())
    return str(tmp_path / "unlabeled")


def write_run(out: Path, archive: str, images: list[dict[str, Any]], family: str) -> str:
    """What `score_archive` writes; the last image has an error, and each third has nothing to find."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": family}}
    rng = np.random.default_rng(1)
    rows = [row | scores(family, number, rng) for number, row in enumerate(images)]
    rows[-1] |= dict.fromkeys([*kinds(family).names, schema.HEIGHT_PX, schema.WIDTH_PX])
    rows[-1] |= {schema.ERROR: "no image"}
    fields = pa.schema([*schema.SCORES, *kinds(family)], metadata={schema.FINDINGS_KEY: json.dumps(FINDINGS)})
    return write_scored(out, settings, pa.Table.from_pylist(rows[::-1], fields))


def kinds(family: str) -> pa.Schema:
    if family == "align":
        return pa.schema([(schema.THETA, pa.list_(pa.float32(), 6))])
    if family in ("lungs", "pneumothorax"):
        return schema.MASK_SCORES
    labels = [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    boxes = schema.BOX_SCORES if family in ("attend", "localize", "detect") else ()
    return pa.schema([*(labels if family != "detect" else ()), *boxes])


def scores(family: str, number: int, rng: np.random.Generator) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[10 : 10 + 4 * (number % 3), 5:25] = True
    p = rng.uniform(0, 1, len(FINDINGS))
    own = {
        schema.PROBABILITIES: p.tolist(),
        schema.DECISIONS: (p > 0.5).astype(int).tolist(),
        schema.PRED_BOXES: [BOX | {"score": 0.3 + 0.05 * number}, BOX | {"score": 0.1}] if number % 3 else [],
        schema.THETA: [1.0, 0.0, 0.02 * number, 0.0, 1.0, 0.0],
        schema.PRED_MASK_RLE: rle.encode(mask),
        schema.PRED_MASK_AREA_PX: int(mask.sum()),
        schema.PRED_MASK_PROBABILITY: float("nan") if family == "lungs" else 0.5,
    }
    return {name: own[name] for name in kinds(family).names}


def listed(archive: str) -> list[dict[str, Any]]:
    names = (schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.SOURCE_URI)
    rows = open_manifest(archive).table.select(names).to_pylist()
    return [row | {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE} for row in rows]


def read_csv(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(uri).read_text().splitlines()))


@pytest.mark.draws
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_over_an_unlabeled_folder_is_described(folder: str, tmp_path: Path, family: str) -> None:
    run = write_run(tmp_path / "run", folder, listed(folder), family)
    result = reports.report(run, ReportOptions(), str(tmp_path / "out"))
    metrics = json.loads(json.dumps(result["metrics"], allow_nan=False))
    assert (metrics["images"], metrics["patients"], metrics["images_with_error"]) == (IMAGES, IMAGES // 2, 1)
    assert [row["error"] for row in read_csv(result["rejects"])] == ["no image"]
    page = Path(result["report"]).read_text()
    assert re.search(r"ground truth +\| none", page)
    assert "no image" in page
    assert result["pictures"]
    for uri in result["pictures"]:
        assert cv2.imread(uri) is not None
        assert f"(pictures/{Path(uri).name})" in page
    own = scores(family, 0, np.random.default_rng(0))
    if schema.PROBABILITIES in own:
        assert [row["finding"] for row in read_csv(result["findings"])] == list(FINDINGS)
        assert 0 < metrics["positive_share/Mass"] < 1
    if schema.PRED_BOXES in own:
        assert (
            metrics["predicted_boxes"],
            metrics["images_with_boxes/Mass"],
            metrics["images_with_boxes/Hernia"],
        ) == (
            7,
            7,
            0,
        )
        assert "boxes.png" in page
    if schema.PRED_MASK_RLE in own:
        assert (metrics["images_with_mask"], len(read_csv(result["images"]))) == (7, IMAGES - 1)
        assert "masks.png" in page


@pytest.mark.parametrize("family", ["detect", "lungs"])
def test_pictures_of_a_run_over_shards_come_from_the_shards(tmp_path: Path, family: str) -> None:
    archive = write_shards(tmp_path / "shards", {"test": IMAGES}, size=SIDE, findings=())
    frame = {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}
    images = [
        {schema.IMAGE_ID: f"test-{number:04d}.png", schema.SPLIT: "test", schema.RESIZE_TRANSFORM: frame}
        | {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE}
        for number in range(IMAGES)
    ]
    result = reports.report(
        write_run(tmp_path / "run", archive, images, family), ReportOptions(), str(tmp_path / "out")
    )
    assert {Path(uri).name for uri in result["pictures"]} & {"boxes.png", "masks.png"}


def test_a_run_over_several_archives_is_described(folder: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", folder, listed(folder), "lungs")
    set_settings(run, settings_of(run) | {"archive": [folder, str(tmp_path / "gone")]})
    assert reports.report(run, ReportOptions(), str(tmp_path / "out"))["metrics"]["images"] == IMAGES
    with pytest.raises(UserError, match="name the archive to evaluate with --archive"):
        reports.report(run, ReportOptions(compare_with=run), str(tmp_path / "out"))


def test_a_split_without_ground_truth_can_be_chosen(folder: str, tmp_path: Path) -> None:
    images = listed(folder)
    run = write_run(tmp_path / "run", folder, images, "detect")
    train = [row for row in images if row[schema.SPLIT] == "train"]
    result = reports.report(run, ReportOptions(split="train"), str(tmp_path / "out"))
    assert 0 < result["metrics"]["images"] == len(train) < IMAGES


def test_a_run_in_which_every_image_failed_is_described(folder: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", folder, listed(folder)[:1], "localize")
    result = reports.report(run, ReportOptions(), str(tmp_path / "out"))
    assert (result["metrics"]["images_with_error"], result["pictures"]) == (1, [])


def test_a_comparison_needs_ground_truth(folder: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", folder, listed(folder), "detect")
    for options in (ReportOptions(compare_with=run), ReportOptions(archive=folder)):
        with pytest.raises(UserError, match=r"has no image in split|there is nothing to evaluate"):
            reports.report(run, options, str(tmp_path / "out"))


def test_labels_without_boxes_are_enough_to_evaluate_a_localizer(tmp_path: Path) -> None:
    def known(split: str, number: int) -> dict[str, Any]:
        return {schema.LABELS: [number % 2, (number + 1) % 2, 0]}

    archive = write_shards(tmp_path / "shards", {"test": IMAGES}, size=SIDE, findings=FINDINGS, known=known)
    images = [
        {schema.IMAGE_ID: f"test-{number:04d}.png", schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE}
        for number in range(IMAGES)
    ]
    run = write_run(tmp_path / "run", archive, images, "localize")
    metrics = reports.report(run, ReportOptions(resamples=20), str(tmp_path / "out"))["metrics"]
    assert (metrics["findings_measured"], metrics["images"]) == (2, IMAGES - 1)
