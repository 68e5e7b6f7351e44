"""Reports of detectors: metrics against the boxes of three readers, pictures, comparison, submission."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.cli.commands import export_kaggle_vinbigdata
from cxr.cli.commands import report as report_command
from cxr.data.shards import ARCHIVE_FILE
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.labeled_scores import labeled_scores
from cxr.evaluation.run import ReportOptions, read_run
from cxr.export.kaggle_vinbigdata import NormalFilter, normal_probabilities, write_submission
from cxr.phantom.vinbigdata import write_vinbigdata_phantom
from cxr.sources import open_manifest, rater_agreement
from cxr.sources.options import Labeling
from tests.written_runs import set_settings, settings_of, write_scored

IMAGES, SIZE = 16, 64
FINDINGS = schema.VINBIGDATA_FINDINGS
CORNERS = rater_agreement.CORNERS
Boxes = list[dict[str, Any]]
ALL = ReportOptions(split="all", resamples=20)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("vinbigdata"))
    write_vinbigdata_phantom(folder, IMAGES, "vinbigdata-png", size=SIZE, prevalence=0.8)
    return folder


@pytest.fixture(scope="module")
def truth(archive: str) -> dict[str, Boxes]:
    """By image that was read: its readers' boxes made one, in pixels of the original."""
    manifest = open_manifest(archive)
    rows = {row[schema.IMAGE_ID]: row[schema.BOXES] for row in manifest.table.to_pylist()}
    return {image: one(boxes) for image, boxes in rows.items() if boxes is not None}


def one(boxes: Boxes) -> Boxes:
    fused = rater_agreement.wbf(*rater_agreement.arrays(boxes, FINDINGS), 3)
    return [
        {schema.LABEL: FINDINGS[label], schema.SCORE: 0.9, **dict(zip(CORNERS, box, strict=True))}
        for box, label in zip(fused.boxes.tolist(), fused.labels.tolist(), strict=True)
    ]


def moved(boxes: Boxes, by: float) -> Boxes:
    """To the right by a share of the width."""
    wide = [box["x_max"] - box["x_min"] for box in boxes]
    return [
        {**box, "x_min": box["x_min"] + by * width, "x_max": box["x_max"] + by * width}
        for box, width in zip(boxes, wide, strict=True)
    ]


def write_run(folder: Path, archive: str, found: dict[str, Boxes | None], family: str = "detect") -> str:
    """A run of `score_archive` on the copies, half as large as the originals; None: an error."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": family}}
    metadata = {schema.FINDINGS_KEY: json.dumps(FINDINGS)}
    fields = pa.schema([*schema.SCORES, *schema.BOX_SCORES], metadata=metadata)
    rows = [score_row(image, boxes) for image, boxes in reversed(found.items())]
    return write_scored(folder, settings, *(pa.Table.from_pylist(part, fields) for part in (rows[:5], rows[5:])))


def score_row(image: str, boxes: Boxes | None) -> dict[str, Any]:
    if boxes is None:
        return {schema.IMAGE_ID: image, schema.SPLIT: "test", schema.ERROR: "no image"}
    size = {schema.HEIGHT_PX: SIZE // 2, schema.WIDTH_PX: SIZE // 2}
    return {
        schema.IMAGE_ID: image,
        schema.SPLIT: "train" if image.startswith("train/") else "test",
        **size,
        schema.PRED_BOXES: [halved(box) for box in boxes],
    }


def halved(box: dict[str, Any]) -> dict[str, Any]:
    """In pixels of the copy that was scored."""
    return {**box, **{name: box[name] / 2 for name in CORNERS}}


@pytest.fixture
def run(archive: str, truth: dict[str, Boxes], tmp_path: Path) -> str:
    return write_run(tmp_path / "run", archive, dict(truth))


def read_csv(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(uri).read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.draws
def test_boxes_that_the_readers_agreed_on_are_perfect_predictions(
    run: str, truth: dict[str, Boxes], tmp_path: Path
) -> None:
    """The page, its tables and all its pictures are there."""
    result = reports.report(run, ALL, str(tmp_path / "report"))
    metrics = result["metrics"]
    assert [metrics[name] for name in ("map_40", "map_40_low", "map_50", "map_50_95")] == pytest.approx([1] * 4)
    assert metrics["ground_truth_boxes"] == metrics["predicted_boxes"] == sum(map(len, truth.values()))
    assert (metrics["images"], metrics["images_without_boxes"], metrics["mean_f1"]) == (len(truth), 0, 1)
    assert {Path(uri).name for uri in result["pictures"]} == {
        *("box_precision_recall.png", "confusion.png", "labels.png", "labels_predicted.png", "boxes_predicted.png"),
        *("box_area.png", "boxes.png", "auroc.png", "roc.png", "precision_recall.png", "reliability.png"),
        "froc.png",
    }
    assert all(Path(uri).stat().st_size > 5000 for uri in result["pictures"])
    rows = {row["finding"]: row for row in read_csv(result["boxes"])}
    named = {box["label"] for boxes in truth.values() for box in boxes}
    assert {finding for finding, row in rows.items() if row["ap_40"]} == {*named, "mean"}
    page = Path(result["report"]).read_text()
    assert all(finding in page for finding in ("No finding", "background", *(set(FINDINGS) - named)))


@pytest.mark.parametrize(("how", "least"), [pytest.param("union", 1.5, marks=pytest.mark.slow), ("majority", 0.0)])
def test_ground_truth_may_be_the_union_or_the_majority_of_readers(
    how: Literal["union", "majority"], least: float, run: str, truth: dict[str, Boxes], archive: str, tmp_path: Path
) -> None:
    """Of all boxes as they are, a detector can find one a place: it misses the other readers'."""
    result = reports.report(run, replace(ALL, labeling=Labeling(reader_boxes=how)), str(tmp_path / "report"))[
        "metrics"
    ]
    rows = open_manifest(archive).table.to_pylist()
    fused = [
        getattr(rater_agreement, how)(*rater_agreement.arrays(row[schema.BOXES] or [], FINDINGS), 3) for row in rows
    ]
    assert result["ground_truth_boxes"] == sum(len(of.scores) for of in fused)
    assert result["ground_truth_boxes"] > least * result["predicted_boxes"]
    assert result["images"] == len(truth)
    assert result["map_40"] < 1


def test_wrong_boxes_errors_and_images_that_were_not_scored(
    archive: str, truth: dict[str, Boxes], tmp_path: Path
) -> None:
    found: dict[str, Boxes | None] = {image: moved(boxes, 0.6) for image, boxes in truth.items()}
    first, second, *_ = (image for image, boxes in truth.items() if boxes)
    found[first] = None
    del found[second]
    result = reports.report(write_run(tmp_path / "run", archive, found), ALL, str(tmp_path / "report"))
    metrics = result["metrics"]
    assert (metrics["map_40"], metrics["map_50_95"]) == (0, 0)
    assert (metrics["images_with_error"], metrics["images"]) == (1, len(truth) - 2)
    assert metrics["images_without_score"] == 1 + IMAGES - len(truth)
    assert metrics["mean_f1"] == 1


def test_two_runs_are_compared_on_the_images_that_both_have_scored(
    run: str, archive: str, truth: dict[str, Boxes], tmp_path: Path
) -> None:
    other = {image: moved(boxes, 0.6) for image, boxes in list(truth.items())[:-1]}
    other_run = write_run(tmp_path / "other", archive, other)
    metrics = reports.report(run, replace(ALL, compare_with=other_run), str(tmp_path / "report"))["metrics"]
    assert (metrics["map_40_gain"], metrics["map_40_gain_low"]) == (1, 1)
    assert metrics["images_compared"] == len(truth) - 1
    assert metrics["images"] == len(truth)


def test_runs_that_cannot_be_evaluated_are_reported(archive: str, tmp_path: Path) -> None:
    strange = write_run(tmp_path / "strange", archive, {"elsewhere.png": []})
    with pytest.raises(UserError, match="there is nothing to evaluate"):
        reports.report(strange, ALL, str(tmp_path / "report"))


def test_boxes_below_the_minimum_score_are_not_counted(run: str, tmp_path: Path) -> None:
    """All scores are .9: with a minimum of .95, no image is predicted positive; average precision is unchanged."""
    result = reports.report(run, replace(ALL, box_score=0.95), str(tmp_path / "report"))
    recalls = 1 / (1 + result["metrics"]["findings_measured"])
    assert (result["metrics"]["map_40"], result["metrics"]["mean_recall"]) == (1, pytest.approx(recalls))
    assert "score of 0.95 or more" in Path(result["report"]).read_text()
    with pytest.raises(UserError, match=r"--box-score from 0 to 1, got 1\.5"):
        replace(ALL, box_score=1.5)


def test_the_job_writes_a_result(run: str, tmp_path: Path) -> None:
    options = report_command.Options(run=(run,), report=replace(ALL, resamples=2), out=str(tmp_path / "report"))
    assert report_command.main(options)["metrics"]["map_40"] == 1


def test_a_submission_lists_every_image_once(archive: str, truth: dict[str, Boxes], tmp_path: Path) -> None:
    box = {"score": 0.123456789, "label": FINDINGS[3], "x_min": 3, "y_min": 5.2, "x_max": 21.2, "y_max": 30}
    other = {**box, "label": FINDINGS[0], "score": 0.5}
    strange = {**box, "label": "Hernia"}
    found = {"train/b.dicom": [box, strange, other], "a.png": [], "c.dicom": None}
    run = write_run(tmp_path / "run", archive, found)
    options = export_kaggle_vinbigdata.Options(run=run, split="all", out=str(tmp_path / "out"))
    result = export_kaggle_vinbigdata.main(options)
    counts = {"images": 3, "normal": 2, "training_images_left_out": 0, "boxes_left_out": 1, "of_unknown_size": 1}
    assert result["metrics"] == {**counts, "errors": 1}
    rows = read_csv(result["submission"])
    assert [row["image_id"] for row in rows] == ["a", "b", "c"]
    assert [row["PredictionString"] for row in rows] == [
        "14 1 0 0 1 1",
        "0 0.5 2 3 11 15 3 0.123457 2 3 11 15",
        "14 1 0 0 1 1",
    ]


def test_a_submission_contains_the_challenges_test_images_and_prints_its_path(
    archive: str, truth: dict[str, Boxes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the test split, the images that train.csv lists are no test images of the challenge."""
    read, *_ = truth
    run = write_run(tmp_path / "run", archive, {"train/b.png": [], "a.png": [], f"{read}.png": [], "c.png": None})
    result = export_kaggle_vinbigdata.main(export_kaggle_vinbigdata.Options(run=run, out=str(tmp_path / "out")))
    assert [row["image_id"] for row in read_csv(result["submission"])] == ["a", "c"]
    assert (result["metrics"]["training_images_left_out"], result["metrics"]["errors"]) == (1, 1)
    told = capsys.readouterr().out
    assert f"submission: {result['submission']}" in told
    assert "1 images left out because train.csv lists them" in told
    with pytest.raises(UserError, match=r"no image in split 'val' \(test 3, train 1\)"):
        write_submission(read_run(run), str(tmp_path / "submission.csv"), split="val")


def test_runs_without_boxes_or_without_classes_are_rejected(archive: str, tmp_path: Path) -> None:
    aecnn = read_run(write_run(tmp_path / "aecnn", archive, {"a.png": []}, family="aecnn"))
    with pytest.raises(UserError, match=r"is a run of family aecnn, but .* needs family detect or attend"):
        write_submission(aecnn, str(tmp_path / "submission.csv"))
    with pytest.raises(UserError, match=r"is a run of family detect, but .* needs family aecnn or"):
        normal_probabilities(read_run(write_run(tmp_path / "detect", archive, {"a.png": []})))


@pytest.mark.parametrize("as_shards", [False, True])
def test_boxes_in_copies_are_submitted_in_pixels_of_the_originals(
    as_shards: bool, archive: str, truth: dict[str, Boxes], tmp_path: Path
) -> None:
    image = next(image for image, boxes in truth.items() if boxes)
    scored = archive
    if as_shards:
        scored = str(tmp_path / "shards")
        storage.write_json(f"{scored}/{ARCHIVE_FILE}", {"archive": archive})
    run = write_run(tmp_path / "run", scored, {image: truth[image], "d": None})
    counts = write_submission(read_run(run), str(tmp_path / "submission.csv"), split="all")
    assert counts["of_unknown_size"] == 0
    written = next(row for row in read_csv(str(tmp_path / "submission.csv")) if row["image_id"] == image)
    found = np.array(written["PredictionString"].split(), float).reshape(-1, 6)
    wanted = [[FINDINGS.index(box["label"]), *(box[name] for name in CORNERS)] for box in truth[image]]
    assert sorted(found[:, [0, 2, 3, 4, 5]].tolist()) == sorted(np.rint(wanted).tolist())


def test_a_submission_takes_a_classifiers_word_on_normal_images(archive: str, tmp_path: Path) -> None:
    box = {"score": 0.5, "label": FINDINGS[3], "x_min": 4, "y_min": 6, "x_max": 22, "y_max": 30}
    run = read_run(write_run(tmp_path / "run", archive, {name: [box] for name in ("a", "b", "c")}))
    uri = str(tmp_path / "submission.csv")
    told = NormalFilter({"a": 0.01, "b": 0.5, "c": 0.99}, low=0.08, high=0.95)
    assert write_submission(run, uri, told)["normal"] == 1
    own = "3 0.5 2 3 11 15"
    assert [row["PredictionString"] for row in read_csv(uri)] == [own, f"{own} 14 0.5 0 0 1 1", "14 1 0 0 1 1"]
    with pytest.raises(UserError, match=r"has no score of [ac]:"):
        write_submission(run, uri, NormalFilter({"b": 0.5}, low=0.08, high=0.95))


@pytest.mark.parametrize(
    ("findings", "expected"), [(["Mass", "No finding"], [0.3, 0.9]), (["Mass", "Nodule"], [0.4, 0.1])]
)
def test_the_probability_that_an_image_is_normal(findings: list[str], expected: list[float], tmp_path: Path) -> None:
    settings = {"archive": "x", "checkpoint_sha256": "0", "recipe": {"family": "aecnn"}}
    own = [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    fields = pa.schema([*schema.SCORES, *own], metadata={schema.FINDINGS_KEY: json.dumps(findings)})
    rows = [
        {schema.IMAGE_ID: name, schema.PROBABILITIES: p, schema.DECISIONS: [0, 0]}
        for name, p in (("a", [0.6, 0.3]), ("b", [0.1, 0.9]))
    ]
    told = normal_probabilities(read_run(write_scored(tmp_path, settings, pa.Table.from_pylist(rows, fields))))
    np.testing.assert_allclose([told["a"], told["b"]], expected, atol=1e-6)


def test_two_images_with_the_same_name_cannot_be_submitted(archive: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", archive, {"one/a.png": [], "two/a.png": []}))
    with pytest.raises(UserError, match="two images named a"):
        write_submission(run, str(tmp_path / "submission.csv"))


def test_boxes_of_no_finding_of_the_challenge_cannot_be_submitted(archive: str, tmp_path: Path) -> None:
    box = {"score": 0.5, "label": "Hernia", "x_min": 0, "y_min": 0, "x_max": 2, "y_max": 2}
    run = read_run(write_run(tmp_path / "run", archive, {"a.png": [box]}))
    with pytest.raises(UserError, match="none for VinBigData's findings"):
        write_submission(run, str(tmp_path / "submission.csv"))


@pytest.mark.slow
def test_the_thresholds_of_a_run_decide_which_boxes_count(
    archive: str, truth: dict[str, Boxes], tmp_path: Path
) -> None:
    found: dict[str, Boxes | None] = {**truth}
    run = write_run(tmp_path / "run", archive, found)
    before = reports.report(run, ALL, str(tmp_path / "before"))
    assert "hardest" not in before
    finding = next(box["label"] for boxes in truth.values() for box in boxes)
    set_settings(run, settings_of(run) | {"thresholds": {finding: 1.05}})
    labeled = labeled_scores(read_run(run), archive, ALL)
    decided = dict(zip(labeled.findings, labeled.predicted_positive.any(0).tolist(), strict=True))
    assert decided.pop(finding) is False
    assert any(decided.values())
    after = reports.report(run, ALL, str(tmp_path / "after"))
    assert after["metrics"]["map_40"] == before["metrics"]["map_40"] == 1  # of all scores
    assert after["metrics"]["mean_froc"] == 1
    assert after["metrics"][f"sensitivity/{finding}"] == 0
    points = {row["finding"]: row for row in read_csv(after["operating_points"]) if row["chosen_by"] == "this run"}
    assert (points[finding]["threshold"], points[finding]["true_positives"]) == ("1.05", "0")
    rows = read_csv(after["hardest"])
    assert {(row["kind"], row["finding"]) for row in rows} == {("missed box", finding)}
    assert len(rows) == sum(box["label"] == finding for boxes in truth.values() for box in boxes)
    assert "of at least the finding's threshold" in Path(after["report"]).read_text()
