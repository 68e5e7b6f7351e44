"""The contract that every family keeps; a new one adds a small recipe to SMALL."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import optuna
import pyarrow as pa
import pytest
import torch
from optuna.distributions import BaseDistribution

from cxr import schema
from cxr.data.batch import HAS_BOXES, NO_MASK, Batch
from cxr.errors import UserError
from cxr.families import RECIPES, checkpoint, recipe_from_dict
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe, ScoringContext, SingleProcess
from cxr.families.classify import ClassifyRecipe
from cxr.families.detect import DetectRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.imaging.geometry import ResizeTransform
from cxr.schema import MOST_BOXES
from cxr.training.engine import Engine

SMALL: dict[str, Recipe] = {
    "align": AlignRecipe(size=32, backbone="conv3", batch_size=4, epochs=1, lungs=False),
    "aecnn": AecnnRecipe(size=32, patch=16, width=8, backbone="resnet18", stem_stride=1, batch_size=4, epochs=1),
    "attend": AttendRecipe(size=32, batch_size=4, epochs=1),
    "classify": ClassifyRecipe(size=32, batch_size=4, epochs=1),
    "detect": DetectRecipe(size=32, batch_size=4, epochs=1),
    "localize": LocalizeRecipe(size=32, batch_size=4, epochs=1),
    "lungs": LungsRecipe(size=32, warmup_size=0, warmup_epochs=0, batch_size=4, epochs=1),
    "pneumothorax": PneumothoraxRecipe(size=32, architecture="fcn16s", backbone="resnet18", batch_size=4, epochs=1),
}


@pytest.fixture(params=sorted(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return SMALL[request.param]


def some_batches(count: int = 2, rows: int = 4, size: int = 40) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {
            schema.PIXELS: torch.randint(0, 255, (rows, size, size), generator=generator).to(torch.uint8),
            schema.TRUE_THETA: torch.full((rows, 6), float("nan")),
            schema.MASKS: some_masks(rows, size),
            schema.BOXES: some_boxes(rows),
            HAS_BOXES: torch.ones(rows, dtype=torch.bool),
            schema.IMAGE_ID: torch.arange(rows),
            schema.LABELS: torch.zeros(rows, len(schema.FINDINGS), dtype=torch.int8),
        }


def some_masks(rows: int, size: int) -> torch.Tensor:
    """One is known, the others are not."""
    masks = torch.full((rows, size, size), NO_MASK, dtype=torch.uint8)
    masks[0] = (torch.arange(size) < size // 2).to(torch.uint8)
    return masks


def some_boxes(rows: int) -> torch.Tensor:
    """One image has one."""
    boxes = torch.full((rows, MOST_BOXES, 5), float("nan"))
    boxes[0, 0] = torch.tensor([2, 0.1, 0.2, 0.6, 0.7])
    return boxes


def engine_of(recipe: Recipe) -> Engine:
    torch.manual_seed(0)
    task = recipe.task(recipe.network(schema.FINDINGS))
    task.begin(some_batches, SingleProcess())
    return Engine(task, recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))


def test_settings_survive_json(recipe: Recipe) -> None:
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert type(again) is type(recipe)


def test_settings_missing_from_older_recipes_have_their_defaults(recipe: Recipe) -> None:
    written = json.loads(json.dumps(recipe.to_dict()))
    older = {name: value for name, value in written.items() if name != "denoise"}
    assert recipe.changes_from(older) == []
    assert recipe.replace(denoise="median").changes_from(older) == ["denoise was 'none', is 'median'"]


def test_defaults_need_no_download(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.models.pretrained.from_torchvision", None)
    assert type(recipe)().resolve_weights(str(tmp_path)) == (type(recipe)(), [])
    assert list(tmp_path.iterdir()) == []


def test_every_searched_setting_exists_and_takes_effect(recipe: Recipe) -> None:
    space = recipe.search_space()
    assert space
    for seed in range(3):
        drawn = draw(space, seed)
        changed = recipe.replace(**drawn)
        assert {name: getattr(changed, name) for name in drawn} == drawn


def draw(space: dict[str, BaseDistribution], seed: int) -> dict[str, object]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    return study.ask(space).params


def test_an_epoch_gives_finite_losses_and_the_monitored_metric(recipe: Recipe) -> None:
    engine = engine_of(recipe)
    before = {name: p.clone() for name, p in engine.task.network.named_parameters()}
    means = engine.epoch(some_batches())
    assert means["loss"] == pytest.approx(
        sum(v for k, v in means.items() if k not in ("loss", "grad_norm", "images"))
    )
    assert any(not torch.equal(before[name], p) for name, p in engine.task.network.named_parameters())
    assert recipe.monitor in engine.finish_epoch(some_batches)


def test_predictions_have_the_declared_columns(recipe: Recipe) -> None:
    network = recipe.network(schema.FINDINGS).eval()
    with torch.inference_mode():
        predicted = recipe.predict(network, next(some_batches()))
        pictures = recipe.render(network, next(some_batches()))
    frame = ResizeTransform().as_dict()
    known = {schema.RESIZE_TRANSFORM: [frame] * 4, schema.HEIGHT_PX: [40] * 4, schema.WIDTH_PX: [40] * 4}
    assert (
        recipe.scored(predicted, pa.table(known), ScoringContext(schema.FINDINGS, 40)).schema.names
        == recipe.score_columns.names
    )
    for images in pictures.values():
        assert images.dtype == torch.uint8
        assert len(images) == 4


def test_a_task_resumes_from_its_state(recipe: Recipe) -> None:
    engine = engine_of(recipe)
    engine.epoch(some_batches())
    other = recipe.task(recipe.network(schema.FINDINGS))
    other.train().enter_stage(engine.stage.name)
    checkpoint.restore_task_state(other, checkpoint.task_state(engine.task))
    other.network.load_state_dict(engine.task.network.state_dict())
    torch.manual_seed(1)
    expected = engine.task(engine.task.augment(next(some_batches())))
    torch.manual_seed(1)
    found = other(other.augment(next(some_batches())))
    wanted = {name: value.item() for name, value in expected.items()}
    assert {k: v.item() for k, v in found.items()} == pytest.approx(wanted, rel=1e-4)  # memory formats may differ


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match="unknown family 'cat': expected one of align"):
        recipe_from_dict({"family": "cat"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"ema": 1.0},
        {"size": 0},
        {"clip": -1.0},
        {"weight_decay": -0.1},
    ],
)
def test_settings_out_of_range_are_rejected(recipe: Recipe, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
        recipe.replace(**wrong)
