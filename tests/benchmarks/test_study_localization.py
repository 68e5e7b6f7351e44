"""The localization study: accuracies, resampled seeds and patients, the report, and the job."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.benchmarks.studies import localization, localization_report
from cxr.benchmarks.studies.localization import Evaluated, LocalizationResult
from cxr.benchmarks.studies.seed_results import SeedMean
from cxr.cli import study_localization as study
from cxr.cli.commands import phantom as phantom_command
from cxr.cli.commands.study_localization import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_localization import FINDINGS, LAST, MULTISCALE, VARIANTS, named
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.run import ReportOptions, Run, read_run
from cxr.families.localize import LocalizeRecipe
from cxr.metrics.localization import locate
from tests.benchmarks.study_jobs import untrained, without_checks
from tests.inference.scored_here import without_ray  # noqa: F401
from tests.made_shards import write_shards
from tests.written_runs import write_scored

SIZE, IMAGES = 32, 40
EDGES = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
FRAME = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}


def known(split: str, number: int) -> Mapping[str, object]:
    """A heart in every second image and a nodule in every third, in pixels of originals of 64 px."""
    shown = {"Cardiomegaly": number % 2 == 0, "Nodule": number % 3 == 0}
    places = {"Cardiomegaly": (10, 20, 50, 60), "Nodule": (30 + number % 5, 8, 38 + number % 5, 16)}
    boxes = [{"label": f, **dict(zip(EDGES, places[f], strict=True))} for f, there in shown.items() if there]
    labels = [int(shown.get(finding, False)) for finding in schema.FINDINGS]
    return {
        schema.PATIENT_ID: f"{split} {number // 2}",
        schema.LABELS: labels,
        schema.BOXES: boxes or None,
        schema.RESIZE_TRANSFORM: FRAME,
        schema.HEIGHT_PX: 64,
        schema.WIDTH_PX: 64,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, size=SIZE, known=known)


def network(folder: Path, shift: Mapping[str, float], right: float = 1.0) -> Run:
    """The run of a network that knows the truth. It shifts boxes by a share of their width; `right` weights the true
    labels."""

    def score(number: int) -> dict[str, object]:
        true: Any = known("test", number)
        return {
            schema.IMAGE_ID: f"test-{number:04d}.png",
            schema.HEIGHT_PX: 64,
            schema.WIDTH_PX: 64,
            schema.PRED_BOXES: [_moved(box, shift) for box in true[schema.BOXES] or []],
            schema.PROBABILITIES: [right * label + (1 - right) * 0.5 for label in true[schema.LABELS]],
            schema.DECISIONS: true[schema.LABELS],
        }

    fields = pa.schema(
        [*schema.SCORES, *LocalizeRecipe.score_columns], {schema.FINDINGS_KEY: json.dumps(schema.FINDINGS)}
    )
    settings = {"archive": "shards", "checkpoint_sha256": "0", "recipe": {"family": "localize"}}
    rows = [score(number) for number in range(IMAGES)]
    return read_run(write_scored(folder, settings, pa.Table.from_pylist(rows, fields)))


def _moved(box: dict[str, Any], shift: Mapping[str, float]) -> dict[str, Any]:
    width = shift[box["label"]] * (box["x_max"] - box["x_min"])
    moved = {"x_min": box["x_min"] + width, "x_max": box["x_max"] + width}
    return {"label": box["label"], "score": 0.5, **{name: box[name] for name in EDGES}, **moved}


@pytest.fixture(scope="module")
def truth(shards: str) -> BoxTruth:
    return known_boxes(shards, ReportOptions(split="test"))


@pytest.fixture(scope="module")
def exact(truth: BoxTruth, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A network that locates nodules exactly."""
    return Evaluated.of(network(tmp_path_factory.mktemp("exact"), {"Nodule": 0.0, "Cardiomegaly": 0.3}), truth)


@pytest.fixture(scope="module")
def results(truth: BoxTruth, exact: Evaluated, tmp_path_factory: pytest.TempPathFactory) -> list[LocalizationResult]:
    """Three seeds: two locate nodules exactly and one misses them; both variants locate hearts equally well."""
    shift, folder = {"Nodule": 1.0, "Cardiomegaly": 0.3}, tmp_path_factory.mktemp("runs")
    lost, random = (Evaluated.of(network(folder / f"{p}", shift, p), truth) for p in (1.0, 0.0))
    variants = (MULTISCALE, [exact, exact, lost]), (LAST, [random] * 3)
    return [localization.summarize(name, of) for name, of in variants]


def test_results_are_per_seed_and_finding(results: list[LocalizationResult]) -> None:
    multiscale, last = results
    assert multiscale.findings == ("Cardiomegaly", "Nodule")
    nodules = localization.accuracy(multiscale, "iou", 0.5, ["Nodule"])
    assert (nodules.value, nodules.sd) == pytest.approx((2 / 3, np.std([1, 1, 0], ddof=1)))
    assert (nodules.low, nodules.high) == (0, 1), "seeds are resampled: all may be good, or none"
    hearts = [localization.accuracy(result, "iou", 0.5, ["Cardiomegaly"]) for result in results]
    assert [h.value for h in hearts] == [1, 1]  # 70 of 130: IoU .54
    assert localization.accuracy(multiscale, "iou", 0.6, ["Cardiomegaly"]).value == 0
    assert multiscale.false_positives["iou"][2, 1, 0] == pytest.approx(14 / IMAGES)
    assert multiscale.aurocs.tolist() == [1, 1, 1]
    assert last.aurocs.tolist() == [0.5] * 3


def test_gains_use_the_same_patients_and_seeds(results: list[LocalizationResult]) -> None:
    gains = localization.gains(results[0], results[1])
    assert gains["small_gain_iou_30"].value == pytest.approx(2 / 3)
    assert gains["large_gain_iou_30"] == SeedMean(0, 0, 0, 0)
    assert (gains["auroc_gain"].value, gains["auroc_gain"].low) == (0.5, 0.5)
    same = localization.gains(results[0], results[0])
    assert same["small_gain_iou_30"] == SeedMean(0, 0, 0, 0), "paired differences of a result with itself are 0"


def test_intervals_resample_patients(exact: Evaluated) -> None:
    """One seed that locates hearts in every second of twenty images: the interval is the binomial one."""
    boxes = exact.boxes
    located = locate(boxes.true.at(boxes.true.image % 4 == 0), boxes.true, boxes.located.known)
    of = localization._result("half", [located], boxes, np.zeros(1), np.zeros((1, 1000)), 0)
    hearts = localization.accuracy(of, "iou", 0.5, ["Cardiomegaly"])
    assert hearts.value == 0.5
    assert 0.2 < hearts.low < hearts.value
    assert np.isnan(hearts.sd)


def test_baselines_are_in_the_report(truth: BoxTruth, exact: Evaluated, results: list[LocalizationResult]) -> None:
    chance, center = localization.baseline_results(exact, truth)
    hearts = localization.accuracy(center, "iou", 0.9, ["Cardiomegaly"])
    assert hearts.value == 1, "the heart never moves in these images"
    assert localization.accuracy(chance, "iou", 0.9, ["Nodule"]).value < 0.5
    assert np.isnan(chance.aurocs).all()
    page = localization_report.page([*results, chance, center], "", "40 images.", 1000)
    assert "0.67 (0.00 to 1.00)" in page
    assert "40 images." in page
    assert re.search(r"\| multiscale +\| 2 +\| 1.00 +\| 0.00 +\| 1.000 +\|", page), "each seed has a row"
    rows = list(csv.DictReader(io.StringIO(localization_report.csv([*results, center]))))
    assert len(rows) == 3 * 2 * 9 * 3
    metrics = localization.metrics([*results, chance, center], {})
    row = next(r for r in rows if (r["network"], r["measure"], r["threshold"]) == (MULTISCALE, "iou", "0.3"))
    assert float(row["accuracy"]) == pytest.approx(metrics[f"{MULTISCALE}_accuracy_iou_30/Cardiomegaly"])
    assert "random_auroc" not in metrics
    assert not any(np.isnan(value) for value in metrics.values())
    assert len(localization_report.picture([*results, chance, center]).axes) == 3


def test_mistakes_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"variants: expected some of multiscale, logits, .* got first"):
        main(Options(out=out, variants=("first",)))
    with pytest.raises(UserError, match="got --stream: omit it"):
        main(Options(out=out, data=ArchiveOptions(stream=True)))
    phantom = phantom_command.Options(out=out, layout="siim", findings=("Mass",))
    with pytest.raises(UserError, match="which has fixed findings, got Mass"):
        phantom_command.main(phantom)
    assert not Path(out).exists()


def test_variants_differ() -> None:
    defaults = ("multiscale-lse", "last-lse")
    others = [name for name in VARIANTS if name not in defaults]
    recipes = named(others, LocalizeRecipe()) | named(defaults, LocalizeRecipe())
    settings = {
        (recipe.cam_stages, recipe.stage_weights, recipe.combine_stages, recipe.pooling)
        for recipe in recipes.values()
    }
    assert len(settings) == len(recipes) - 2  # multiscale-lse and last-lse are the defaults by name
    assert recipes["last-mean"].pooling == "mean"
    assert recipes["uniform"].stage_weights == "uniform"
    with pytest.raises(UserError, match="got multiscale and multiscale-lse, which are the same with these settings"):
        named(("multiscale", "multiscale-lse"), LocalizeRecipe())
    with pytest.raises(UserError, match=r"--variants: expected some of multiscale, .* got none"):
        named((), LocalizeRecipe())


def test_phantoms_show_small_and_large_findings(tmp_path: Path) -> None:
    options = phantoms_with_boxes(ArchiveOptions(phantoms=8, stored_size=64), str(tmp_path), FINDINGS)
    lines = (Path(options.archive[0]) / "BBox_List_2017.csv").read_text().splitlines()[1:]
    assert {line.split(",")[1] for line in lines} <= set(FINDINGS)
    assert len(lines) > 3


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch, without_ray: None) -> None:  # noqa: F811
    monkeypatch.setattr(study, "train_all", untrained(schema.FINDINGS))
    without_checks(monkeypatch)


@pytest.mark.usefixtures("without_training")
def test_an_archive_without_boxes_is_rejected_before_training(tmp_path: Path) -> None:
    bare = write_shards(tmp_path / "shards", {"test": 4}, size=SIZE)
    options = Options(out=str(tmp_path / "out"), data=ArchiveOptions(archive=(bare,)), recipe=LocalizeRecipe(size=32))
    with pytest.raises(UserError, match="none of 4 images of its test split has a box of Atelectasis"):
        main(options)


@pytest.mark.usefixtures("without_training")
def test_the_job_reports_every_network(shards: str, tmp_path: Path) -> None:
    recipe = LocalizeRecipe(size=32)
    data = ArchiveOptions(archive=(shards,))
    result = main(Options(out=str(tmp_path), variants=(MULTISCALE, LAST), seeds=1, data=data, recipe=recipe))
    metrics = result["metrics"]
    assert (metrics["images"], metrics["pairs/Cardiomegaly"], metrics["pairs/Nodule"]) == (IMAGES, 20, 14)
    for name in ("small_gain_iou_30", "large_gain_iou_30", "auroc_gain"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    page = (tmp_path / "table.md").read_text()
    assert "40 test images, of these with a box: Cardiomegaly 20, Nodule 14; 1 seed." in page
    assert "T(IoU) = 0.3, Nodule " in page
    assert all(Path(uri).exists() for uri in (result["table"], *result["pictures"]))
