"""An ensemble compared with its members: average precision, the best member, the gain over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.benchmarks.studies import detection
from cxr.benchmarks.studies.boxed_xrays import BoxedXRays
from cxr.cli import detect_ensemble
from cxr.cli.commands import benchmark_detect
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.checkpoint import Checkpoint
from tests.families.test_recipes import some_batches
from tests.made_shards import write_shards

CPU = torch.device("cpu")
SIZE, IMAGES = 32, 24
FRAME = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}
HEART = {"label": "Cardiomegaly", "x_min": 10.0, "y_min": 20.0, "x_max": 50.0, "y_max": 60.0}
NODULE = {"label": "Nodule", "x_min": 30.0, "y_min": 8.0, "x_max": 38.0, "y_max": 16.0}


def known(split: str, number: int) -> Mapping[str, object]:
    """A heart in even images, a nodule in odd ones; of every sixth image the boxes are not known."""
    shown = HEART if number % 2 == 0 else NODULE
    return {
        schema.PATIENT_ID: f"{split} {number // 2}",
        schema.LABELS: [int(finding == shown["label"]) for finding in schema.FINDINGS],
        schema.BOXES: None if number % 6 == 0 else [shown],
        schema.RESIZE_TRANSFORM: FRAME,
        schema.HEIGHT_PX: 64,
        schema.WIDTH_PX: 64,
    }


def detector(finds: Callable[[int], bool]) -> Checkpoint:
    """A detector that predicts the true box of some images, by number, and a false nodule in all images."""
    wrong = {**NODULE, "x_min": 0.0, "x_max": 8.0, schema.SCORE: 0.1}

    def scored(predicted: dict[str, torch.Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        numbers = [int(name[-8:-4]) for name in rows[schema.IMAGE_ID].to_pylist()]
        found = [[{**(HEART, NODULE)[n % 2], schema.SCORE: 0.9}] * finds(n) + [wrong] for n in numbers]
        return pa.table([pa.array(found, schema.BOX_SCORES.field(0).type)], schema=schema.BOX_SCORES)

    recipe = SimpleNamespace(size=SIZE, family="knowing", predict=lambda *_: {}, scored=scored)
    return Checkpoint("/kept", recipe, torch.nn.Identity(), schema.FINDINGS, {})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, size=SIZE, known=known)


@pytest.fixture(scope="module")
def xrays(made: str) -> BoxedXRays:
    found = detection.held_out(made)
    assert found is not None
    assert found[0] == "test"
    return found[1]


MEMBERS = {"hearts": detector(lambda n: n % 2 == 0), "nodules": detector(lambda n: n % 2 == 1 and n % 3 > 0)}


def test_an_ensemble_gains_from_findings_of_some_members(xrays: BoxedXRays) -> None:
    comparison = detection.compare(MEMBERS, detector(lambda n: True), xrays, CPU)
    assert comparison.findings == ("Cardiomegaly", "Nodule")
    assert comparison.true_boxes.tolist() == [8, 12], "hearts whose boxes are not listed count on neither side"
    assert comparison.members["hearts"].tolist() == [1, 0]
    assert comparison.members["nodules"].tolist() == pytest.approx([0, 8 / 12])
    assert comparison.ensemble.tolist() == [1, 1]
    figures = detection.metrics(comparison)
    assert (figures["ensemble_map_40"], figures["best_member_map_40"]) == (1, 0.5)
    assert figures["nodules/map_40"] == pytest.approx(4 / 12)
    gain = [figures[f"ensemble_gain_map_40{end}"] for end in ("_low", "", "_high")]
    assert gain == [0.5, 0.5, 0.5], "hearts are found by both, nodules by one: alike for all patients"
    assert "gains 0.500 (0.500 to 0.500) over hearts" in detection.table(comparison)


def test_equal_boxes_have_no_gain_and_intervals_resample_patients(xrays: BoxedXRays) -> None:
    same = detection.compare(MEMBERS, MEMBERS["hearts"], xrays, CPU).gain
    assert (same.mean, same.mean_low, same.mean_high) == (0, 0, 0)
    some = detection.compare({"nodules": MEMBERS["nodules"]}, detector(lambda n: n % 2 == 1), xrays, CPU).gain
    assert some.mean == pytest.approx(4 / 12 / 2)
    assert 0 < some.mean_low < some.mean < some.mean_high, "the gain depends on the resampled patients"


def test_images_smaller_than_a_network_needs_are_rejected(xrays: BoxedXRays) -> None:
    large = detector(lambda n: True)
    large.recipe.size = 64  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="size=64"):
        detection.compare(MEMBERS, large, xrays, CPU)


def test_validation_images_replace_missing_test_images(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"together": detector(lambda n: True)}
    monkeypatch.setattr(detect_ensemble.checkpoint, "load", lambda uri: kept[uri])
    comparison = detect_ensemble.compare_members(MEMBERS, "together", made, 0)
    assert comparison["images"] == IMAGES
    assert "24 images of the test split, 12 patients" in capsys.readouterr().out
    bare = write_shards(tmp_path / "bare", {"train": 12, "val": 6}, size=SIZE, known=known)
    assert detect_ensemble.compare_members(MEMBERS, "together", bare, 0)["images"] == 6
    assert "no test image has boxes" in capsys.readouterr().out
    unboxed = write_shards(tmp_path / "unboxed", {"train": 12, "val": 6}, size=SIZE)
    assert detect_ensemble.compare_members(MEMBERS, "together", unboxed, 0) == {}
    assert json.dumps(comparison)


def test_boxes_are_written_as_ultralytics_reads_them() -> None:
    """A line per box: finding, center and size, all as shares of the image."""
    lines = [text for _, text in benchmark_detect._labeled(some_batches(1))]
    assert lines == ["2 0.350000 0.450000 0.500000 0.500000\n", "", "", ""]
