"""A file of thresholds changes decisions and nothing else, and fits one checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.checkpoint import Checkpoint
from cxr.families.classify import ClassifyRecipe
from cxr.families.detect import PREDICTIONS, DetectRecipe
from cxr.families.ensemble import EnsembleRecipe
from cxr.families.localize import BOX_OFFSETS, BOX_THRESHOLDS, HEAT, LocalizeRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.families.segmentation import MASK_VALUES
from cxr.families.thresholds_file import ThresholdsFile, with_thresholds
from cxr.imaging.geometry import ResizeTransform

FINDINGS = ("Mass", "Edema", "Hernia")
FILE = ThresholdsFile("classify", "abc", "youden", {"Mass": 0.7, "Hernia": 0.2})


def model(recipe: Any, sha256: str = "abc") -> Checkpoint:
    return Checkpoint("runs/model", recipe, torch.nn.Identity(), FINDINGS, {"sha256": sha256})


def rows_of(images: int, side: int) -> pa.Table:
    transforms = [ResizeTransform().as_dict()] * images
    sides = {name: [side] * images for name in (schema.HEIGHT_PX, schema.WIDTH_PX)}
    return pa.table({schema.RESIZE_TRANSFORM: transforms, **sides})


def written(tmp_path: Path, file: ThresholdsFile) -> str:
    uri = str(tmp_path / "thresholds.json")
    file.write(uri)
    return uri


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_file_survives_writing_and_reading(tmp_path: Path, of_folder: bool) -> None:
    uri = written(tmp_path, FILE)
    assert ThresholdsFile.read(str(tmp_path) if of_folder else uri) == FILE


def test_only_the_checkpoint_that_a_file_was_made_for_takes_it(tmp_path: Path) -> None:
    models = {"a": model(ClassifyRecipe()), "b": model(ClassifyRecipe(), "def")}
    changed = with_thresholds(models, [written(tmp_path, FILE)])
    assert changed["a"].thresholds == FILE.thresholds
    assert changed["b"] is models["b"]
    with pytest.raises(UserError, match=r"thresholds of runs/model \(def\), got those of another checkpoint"):
        with_thresholds({"b": models["b"]}, [written(tmp_path, FILE)])


def test_an_ensemble_takes_thresholds_of_its_members_family(tmp_path: Path) -> None:
    ensemble = EnsembleRecipe.of([ClassifyRecipe(), ClassifyRecipe(seed=1)])
    uri = written(tmp_path, FILE)
    assert with_thresholds({"": model(ensemble)}, [uri])[""].thresholds == FILE.thresholds


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (replace(FILE, family="detect"), "expected thresholds of family classify, got detect"),
        (replace(FILE, thresholds={"Cyst": 0.5}), "expected thresholds of Mass, Edema, Hernia, got Cyst"),
        (replace(FILE, thresholds={"Mass": 2}), "a number from 0 to 1"),
        (replace(FILE, thresholds={"Mass": "0.5"}), "a number from 0 to 1"),  # type: ignore[dict-item]
    ],
)
def test_files_that_do_not_fit_are_explained(tmp_path: Path, file: ThresholdsFile, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_thresholds({"": model(ClassifyRecipe())}, [written(tmp_path, file)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "got no JSON"),
        (b"[]", "got other JSON"),
        (json.dumps({"cxr_thresholds": 2}).encode(), "version 1, got 2"),
        (json.dumps({"cxr_thresholds": 1, "family": "classify"}).encode(), "expected checkpoint_sha256"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ThresholdsFile.read(str(tmp_path / "x.json"))


@pytest.mark.parametrize("recipe", [ClassifyRecipe(), LocalizeRecipe(), EnsembleRecipe.of([ClassifyRecipe()] * 2)])
def test_decisions_of_classifiers_change_and_probabilities_do_not(recipe: Any) -> None:
    p = torch.tensor([[0.69, 0.4, 0.2], [0.7, 0.6, 0.19], [0.1, 0.5, 0.9]])
    decisions = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, -1]], dtype=torch.int8)
    heat = {HEAT: torch.zeros(3, 3, 4, 4), BOX_THRESHOLDS: torch.full((3, 3), 0.5), BOX_OFFSETS: torch.zeros(3, 3, 4)}
    predicted = {schema.PROBABILITIES: p, schema.DECISIONS: decisions, **heat}
    rows = rows_of(3, 40)
    thresholds = {"Mass": float(np.float32(0.7)), "Hernia": float(np.float32(0.2))}
    scores = recipe.scored(predicted, rows, ScoringContext(FINDINGS, 40, thresholds))
    assert scores[schema.DECISIONS].to_pylist() == [[0, 0, 1], [1, 1, 0], [0, 1, -1]]
    assert np.array_equal(np.array(scores[schema.PROBABILITIES].to_pylist(), np.float32), p.numpy())
    assert decisions.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, -1]]


def test_masks_below_the_smallest_area_are_emptied_and_others_do_not_change() -> None:
    recipe = PneumothoraxRecipe(size=32)
    values = torch.zeros(2, 32, 32)
    values[0, :4, :8] = 1  # 32 of 1024 pixels
    values[1, :8, :8] = 1
    rows = rows_of(2, 32)
    predicted = {MASK_VALUES: values, schema.PRED_MASK_PROBABILITY: torch.tensor([0.3, 0.8])}
    before = recipe.scored(predicted, rows, ScoringContext((), 32)).to_pylist()
    small, large = recipe.scored(predicted, rows, ScoringContext((), 32, {schema.PNEUMOTHORAX: 0.05})).to_pylist()
    assert [row[schema.PRED_MASK_AREA_PX] for row in before] == [32, 64]
    assert (small[schema.PRED_MASK_AREA_PX], small[schema.PRED_MASK_PROBABILITY]) == (0, pytest.approx(0.3))
    assert large == before[1]
    exact = recipe.scored(predicted, rows, ScoringContext((), 32, {schema.PNEUMOTHORAX: 64 / 1024})).to_pylist()
    assert exact[1] == before[1]


def test_boxes_stay_with_all_their_scores() -> None:
    """Reports and exports apply the thresholds of detectors; average precision needs all boxes."""
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5, 0.3, 0], [0.2, 0.2, 0.6, 0.6, 0.9, 1]]])
    scores = DetectRecipe().scored({PREDICTIONS: boxes}, rows_of(1, 40), ScoringContext(FINDINGS, 40, {"Mass": 0.5}))
    assert [box["score"] for box in scores[schema.PRED_BOXES][0].as_py()] == pytest.approx([0.9, 0.3])
