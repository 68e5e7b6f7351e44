"""Reports of boxes: in the originals' pixels, for raw archives and shards, with metrics and pictures."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.cli.commands import report as report_command
from cxr.data.decode import make_rows
from cxr.data.shards import KIND, REJECTS_FILE
from cxr.errors import UserError
from cxr.evaluation import localization, reports
from cxr.evaluation.ground_truth_boxes import known_boxes
from cxr.evaluation.run import SCORES, ReportOptions, read_run
from cxr.metrics.localization import Boxes
from cxr.phantom.archive import write_phantom
from cxr.reporting.overlays import BoxPair
from cxr.runtime.job import write_result
from cxr.schema import FINDINGS_KEY, PixelFormat
from cxr.sources import open_manifest
from tests.made_shards import finish_shards
from tests.written_runs import write_scored

SIDE, IMAGES = 96, 40
SCORED = ("Mass", "Hernia", "Nodule")  # of the checkpoint, in its order
PICTURES = {
    "accuracy",
    "boxes",
    "box_area",
    "auroc",
    "roc",
    "precision_recall",
    "reliability",
    "labels_predicted",
    "separation",
}
ALL = ReportOptions(split="all", resamples=30)
CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Phantoms whose list of boxes refers to 1024 x 1024 pixels."""
    folder = str(tmp_path_factory.mktemp("raw"))
    write_phantom(folder, IMAGES, size=SIDE, findings=("Nodule", "Mass", "Cardiomegaly"), prevalence=0.8)
    return folder


@pytest.fixture(scope="module")
def images(raw: str) -> Rows:
    """The images with their ground-truth boxes in their own pixels."""
    rows = open_manifest(raw).table.to_pylist()
    for row in rows:
        row[schema.BOXES] = [
            {**box, **{name: box[name] * SIDE / 1024 for name in CORNERS}} for box in row[schema.BOXES] or []
        ]
    return rows


def found_in(row: dict[str, Any], shift: float) -> list[dict[str, Any]]:
    """The ground-truth boxes moved to the right by a share of their width, and a false nodule in every image."""
    own = [
        {"label": box["label"], "score": 0.9, **{name: box[name] for name in CORNERS}} for box in row[schema.BOXES]
    ]
    for box in own:
        width = box["x_max"] - box["x_min"]
        box |= {"x_min": box["x_min"] + shift * width, "x_max": box["x_max"] + shift * width}
    return [*own, {"label": "Nodule", "score": 0.1, **dict(zip(CORNERS, (0, 0, 2, 2), strict=True))}]


def write_run(folder: Path, archive: str, images: Rows, shift: float = 0.0, broken: int = 0) -> str:
    """A run of `score_archive` in two parts; its first `broken` images have an error."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "localize"}}
    own = [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    fields = pa.schema([*schema.SCORES, *own, *schema.BOX_SCORES], metadata={FINDINGS_KEY: json.dumps(SCORED)})
    rows = [score_row(row, found_in(row, shift)) for row in reversed(images)]
    for row in rows[:broken]:
        row |= {
            schema.ERROR: "no image",
            schema.PRED_BOXES: None,
            schema.PROBABILITIES: None,
            schema.DECISIONS: None,
        }
    return write_scored(folder, settings, *(pa.Table.from_pylist(part, fields) for part in (rows[:7], rows[7:])))


def score_row(row: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [row[schema.LABELS][schema.FINDINGS.index(finding)] for finding in SCORED]
    return {
        schema.IMAGE_ID: row[schema.IMAGE_ID],
        schema.HEIGHT_PX: SIDE,
        schema.WIDTH_PX: SIDE,
        schema.PROBABILITIES: [0.2 + 0.6 * label for label in labels],
        schema.DECISIONS: labels,
        schema.PRED_BOXES: found,
    }


def write_shards(folder: Path, raw: str, size: int) -> str:
    """The same images as one shard file."""
    pixels = PixelFormat(size)
    rows = make_rows(open_manifest(raw).table, pixels)
    (folder / "all").mkdir(parents=True)
    splits = sorted(set(rows[schema.SPLIT].to_pylist()))
    parts = {}
    for split in splits:
        own = rows.filter(pa.array([of == split for of in rows[schema.SPLIT].to_pylist()]))
        pq.write_table(own, folder / "all" / f"{split}.parquet", row_group_size=8)
        parts[split] = [{"path": f"all/{split}.parquet", "rows": own.num_rows}]
    pq.write_table(schema.REJECTS.empty_table(), folder / REJECTS_FILE)
    about = {"kind": KIND, "version": 1, "source": "made", "archive": raw, "findings": list(schema.FINDINGS)}
    about |= {"pixels": {"size": size, "bits": 8}, "row_group_rows": 8, "parts": parts, "rejects": 0}
    finish_shards(folder, about)
    return str(folder)


def pairs_of(images: Rows, finding: str) -> int:
    return sum(any(box["label"] == finding for box in row[schema.BOXES]) for row in images)


@pytest.mark.draws
def test_the_job_evaluates_boxes_and_labels(raw: str, images: Rows, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", raw, images, broken=2)
    options = report_command.Options(run=(run,), out=str(tmp_path / "out"), report=ALL)
    write_result("report", options, report_command.main(options), 0)
    result = json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    metrics, scored = result["metrics"], images[:-2]
    pairs = {finding: pairs_of(scored, finding) for finding in ("Mass", "Nodule")}
    assert (metrics["images"], metrics["images_with_error"], metrics["findings_located"]) == (IMAGES - 2, 2, 2)
    assert metrics["pairs"] == sum(pairs.values())
    assert (
        metrics["localization_accuracy_iou90"]
        == metrics["localization_accuracy_iobb90"]
        == metrics["mean_pointing"]
        == 1
    )
    assert metrics["false_positives_per_image_iou50"] == pytest.approx(1 / 2), "a false nodule in each, no false mass"
    assert metrics["random_localization_accuracy_iou50"] <= metrics["random_localization_accuracy_iou10"] < 1
    assert metrics["center_localization_accuracy_iou50"] < 1
    assert metrics["auroc/Mass"] == metrics["mean_auroc"] == 1
    page = Path(result["report"]).read_text()
    assert f"{pairs_of(scored, 'Cardiomegaly')} images with a box of a finding that was not scored" in page
    assert "2 images with an error" in page
    assert "No ground-truth box of Hernia." in page
    assert "## Classification of the 38 images with labels" in page
    assert all(cv2.imread(uri) is not None and f"(pictures/{Path(uri).name})" in page for uri in result["pictures"])
    assert {Path(uri).stem for uri in result["pictures"]} == PICTURES
    table = list(csv.DictReader(Path(result["boxes"]).read_text().splitlines()))
    assert len(table) == 3 * 2 * 9 * 3  # ways, measures, thresholds, findings with their mean
    assert {row["accuracy"] for row in table if row["boxes"] == "run"} == {"1.0"}


def test_shards_contain_the_same_boxes(raw: str, images: Rows, tmp_path: Path) -> None:
    """A shift by a third of the width: IoU 1/2, so that small errors of coordinates matter."""
    run = write_run(tmp_path / "run", raw, images, shift=0.33)
    by_raw = reports.report(run, ALL, str(tmp_path / "by_raw"))["metrics"]
    assert (by_raw["localization_accuracy_iou50"], by_raw["localization_accuracy_iobb60"]) == (1, 1)
    assert by_raw["localization_accuracy_iou60"] < 0.2, "where nodules lie side by side"
    stored = write_shards(tmp_path / "shards", raw, 48)
    options = ReportOptions(archive=stored, split="all", resamples=30)
    by_shards = reports.report(run, options, str(tmp_path / "by_shards"))
    assert by_shards["metrics"] == by_raw
    assert {Path(uri).stem for uri in by_shards["pictures"]} == PICTURES


def test_shown_boxes_lie_on_the_shown_pixels(raw: str, images: Rows, tmp_path: Path) -> None:
    stored = write_shards(tmp_path / "shards", raw, 48)
    copied = str(shutil.copytree(raw, tmp_path / "copied"))
    alone = write_shards(tmp_path / "alone", copied, 48)
    shutil.rmtree(Path(copied) / "images")
    run = read_run(write_run(tmp_path / "run", raw, images))
    for archive, side in ((raw, 512), (stored, 512), (alone, 48)):
        truth = known_boxes(archive, ALL)
        evaluation = localization.evaluate(localization.load_scores(run), SCORED, truth)
        for overlay in localization.overlays(evaluation, truth, 0)["random"]:
            assert overlay.picture.shape == (side, side)
            assert isinstance(overlay.pair, BoxPair)
            assert overlay.pair.truth is not None
            assert len(overlay.pair.prediction_labels) == len(overlay.pair.prediction)
            for box in overlay.pair.truth:
                assert np.abs(overlay.pair.prediction - box).max(1).min() < 1e-3
                assert 0 <= box.min() < box.max() <= side


def test_boxes_of_a_split_and_of_its_training_images(raw: str, images: Rows) -> None:
    truth = known_boxes(raw, ReportOptions(split="test"))
    of_split = {split: [row for row in images if row[schema.SPLIT] == split] for split in ("train", "test")}
    assert truth.table[schema.IMAGE_ID].to_pylist() == sorted(row[schema.IMAGE_ID] for row in of_split["test"])
    training = truth.training_boxes(("Cardiomegaly",))
    wanted = [
        [box[name] / SIDE for name in CORNERS]
        for row in of_split["train"]
        for box in row[schema.BOXES]
        if box["label"] == "Cardiomegaly"
    ]
    np.testing.assert_allclose(training.xyxy, wanted, atol=1e-6)


def test_two_runs_are_compared_on_the_images_that_both_have_scored(raw: str, images: Rows, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", raw, images)
    other = write_run(tmp_path / "other", raw, images[5:], shift=0.33)
    options = ReportOptions(compare_with=other, split="all", resamples=30)
    result = reports.report(run, options, str(tmp_path / "out"))
    metrics = result["metrics"]
    assert metrics["images_compared"] == IMAGES - 5
    assert metrics["localization_accuracy_gain_iou10"] == 0
    assert metrics["localization_accuracy_gain_iou70"] > 0.8
    assert metrics["localization_accuracy_gain_iou70_low"] > 0.5
    assert metrics["mean_auroc_gain"] == 0
    assert f"Compared with {other}, on the 35 images" in Path(result["report"]).read_text()
    empty = [row for row in images if not {"Mass", "Nodule"} & {box["label"] for box in row[schema.BOXES]}]
    alone = write_run(tmp_path / "alone", raw, empty)
    with pytest.raises(UserError, match="have boxes"):
        reports.report(run, ReportOptions(compare_with=alone, split="all", resamples=5), str(tmp_path / "none"))


def test_mistakes_raise_errors(raw: str, images: Rows, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", raw, images, broken=IMAGES)
    with pytest.raises(UserError, match=r"40 are in .*0 were scored without an error"):
        reports.report(run, ALL, str(tmp_path / "out"))
    part = tmp_path / "run" / SCORES / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns([schema.PRED_BOXES]), part)
    with pytest.raises(UserError, match="no column pred_boxes"):
        reports.report(run, ALL, str(tmp_path / "out"))


def test_published_boxes_with_some_of_the_images(real_data: Path, tmp_path: Path) -> None:
    """Perfect boxes of real images are perfect, and that these are few is said."""
    archive = str(real_data / "chestxray14")
    rows = [row for row in open_manifest(archive).table.to_pylist() if row[schema.SPLIT] == "test"]
    for row in rows:
        row[schema.BOXES] = row[schema.BOXES] or []
    run = tmp_path / "run"
    write_run(run, archive, rows)
    for path in (run / SCORES).iterdir():
        table = pq.read_table(path)
        for name in (schema.HEIGHT_PX, schema.WIDTH_PX):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array([1024] * len(table), pa.int32()))
        pq.write_table(table, path)
    result = reports.report(str(run), ReportOptions(resamples=30), str(tmp_path / "out"))
    assert (result["metrics"]["images"], result["metrics"]["pairs"]) == (107, 2)
    assert result["metrics"]["localization_accuracy_iou90"] == 1
    page = Path(result["report"]).read_text()
    assert "1 patient with a box: too few to trust the interval" in page
    assert "2 of 2 findings have boxes in fewer than 10 patients" in page


def test_the_published_box_list(real_data: Path) -> None:
    """984 boxes of 880 images, all for testing; the list's word for Infiltration is another one."""
    lines = list(csv.reader((real_data / "chestxray14" / "BBox_List_2017.csv").read_text().splitlines()))[1:]
    in_test = set((real_data / "chestxray14" / "test_list.txt").read_text().split())
    assert (len(lines), len({line[0] for line in lines})) == (984, 880)
    assert {line[0] for line in lines} <= in_test
    assert len({(line[0], line[1]) for line in lines}) == 984, "one box an image and finding"
    truth = known_boxes(str(real_data / "chestxray14"), ReportOptions(split="all"))
    present = set(truth.table[schema.IMAGE_ID].to_pylist())
    said = Counter(line[1].replace("Infiltrate", "Infiltration") for line in lines if line[0] in present)
    read = Boxes.of(truth.table[schema.BOXES], schema.FINDINGS)
    assert Counter(schema.FINDINGS[finding] for finding in read.finding.tolist()) == said
    assert said["Infiltration"] == 2
    assert "Infiltration" not in {line[1] for line in lines}
