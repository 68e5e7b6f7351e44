"""A search samples only settings that affect training, and offers only objectives that are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import recipe_from_dict
from cxr.families.aecnn import STAGES, AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe, SingleProcess
from cxr.families.lungs import LungsRecipe
from cxr.training.engine import Engine
from cxr.training.options import SearchOptions
from cxr.training.search import searched
from tests.families.test_recipes import SMALL, some_batches

AECNN = SMALL["aecnn"].replace(
    precision="float32", size=32, data_echo_factor=1, classifier_epochs=1, autoencoder_epochs=1
)
PAIRS = [(start, stop) for number, start in enumerate(STAGES) for stop in STAGES[number:]]
VARIANTS: dict[str, Recipe] = {name: recipe for name, recipe in SMALL.items() if name != "aecnn"}
VARIANTS |= {f"aecnn {start} to {stop}": AECNN.replace(first_stage=start, last_stage=stop) for start, stop in PAIRS}
CODECS = {f"aecnn {codec}": AECNN.replace(compressor=codec) for codec in ("published", "resize", "none")}
VARIANTS |= CODECS
QUICK = {"align", "classify", "localize", "lungs", "aecnn joint to joint"}


def batches() -> Iterator[Batch]:
    """Of images that show what their boxes say, and one other finding."""
    for batch in some_batches():
        batch[schema.LABELS][0, 2] = batch[schema.LABELS][1, 5] = schema.POSITIVE
        yield batch


@dataclass
class Trained:
    """The mean loss of the last stage's epoch, and the network's state and metrics after it."""

    loss: float
    state: dict[str, Tensor]
    metrics: dict[str, float]


def trained(recipe: Recipe) -> Trained:
    return _trained(json.dumps(recipe.to_dict()))


@cache
def _trained(settings: str) -> Trained:
    recipe = recipe_from_dict(json.loads(settings))
    torch.manual_seed(0)
    task = recipe.task(recipe.network(schema.FINDINGS))
    task.begin(batches, SingleProcess())
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    loss, metrics = 0.0, {}
    for stage in recipe.stages():
        engine.enter(stage)
        torch.manual_seed(1)
        loss = engine.epoch(batches())["loss"]
        metrics = engine.finish_epoch(batches)
    return Trained(loss, engine.task.network.state_dict(), metrics)


def two_of(drawn: BaseDistribution) -> tuple[Any, Any]:
    if isinstance(drawn, CategoricalDistribution):
        return drawn.choices[0], drawn.choices[1]
    assert isinstance(drawn, FloatDistribution | IntDistribution)
    return drawn.low, drawn.high


def variant(name: str, *setting: str) -> Any:
    return pytest.param(name, *setting, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "setting"),
    [variant(name, setting) for name, recipe in VARIANTS.items() for setting in recipe.active_search_space()],
)
def test_two_values_of_a_searched_setting_train_differently(name: str, setting: str) -> None:
    space = VARIANTS[name].active_search_space()
    weights = {other: drawn.high for other, drawn in space.items() if isinstance(drawn, FloatDistribution)}
    recipe = VARIANTS[name].replace(**weights)  # a term that is off by default is sampled, too
    first, second = (trained(recipe.replace(**{setting: value})) for value in two_of(space[setting]))
    assert first.loss != second.loss
    shapes, others = ({key: values.shape for key, values in each.state.items()} for each in (first, second))
    assert shapes != others or any(not torch.equal(first.state[key], second.state[key]) for key in shapes)


@pytest.mark.parametrize("name", [variant(name) for name in VARIANTS])
def test_every_objective_is_measured_in_the_last_stage(name: str) -> None:
    recipe = VARIANTS[name]
    assert {recipe.monitor, *recipe.objectives} <= set(trained(recipe).metrics)


CODEC = {"compression", "depth", "width"}
JOINT = {"lr", "bce_weight", "mse_weight", "backbone", *CODEC}


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        ("classifier", "classifier", {"classifier_lr", "backbone", "compression"}),
        ("classifier", "autoencoder", {"autoencoder_lr", *CODEC}),
        ("autoencoder", "autoencoder", {"autoencoder_lr", *CODEC}),
        ("classifier", "joint", JOINT),
        ("autoencoder", "joint", JOINT),
        ("joint", "joint", JOINT),
    ],
)
def test_an_aecnn_search_samples_the_settings_that_its_stages_use(start: Any, stop: Any, expected: set[str]) -> None:
    assert set(AecnnRecipe(first_stage=start, last_stage=stop).active_search_space()) == expected


def test_a_loss_of_one_term_has_no_weight_to_search() -> None:
    assert set(AecnnRecipe(compressor="resize").active_search_space()) == {"lr", "backbone"}
    assert set(AecnnRecipe(compressor="resize", last_stage="autoencoder").active_search_space()) == {
        "classifier_lr",
        "backbone",
    }
    assert "bce_weight" not in AecnnRecipe(mse_weight=0).active_search_space(["mse_weight"])
    assert set(LungsRecipe(bce_weight=0).active_search_space()) == {"lr"}


def test_settings_of_disabled_parts_are_not_searched() -> None:
    assert "feature_layers" in AlignRecipe().active_search_space()
    assert "feature_layers" not in AlignRecipe().active_search_space(["feature_weight"])
    assert "feature_layers" in AlignRecipe(feature_weight=1.0).active_search_space(["feature_weight"])
    assert {"iterations", "feature_network"} <= set(AlignRecipe().active_search_space())
    assert "feature_network" not in AlignRecipe().active_search_space(["feature_weight"])
    assert "target" not in AlignRecipe(target_uri="target.pt").active_search_space()
    assert "box_weight" not in AttendRecipe(box_fraction=0).active_search_space()


def test_a_setting_with_one_value_is_not_searched() -> None:
    small = AecnnRecipe(size=16, patch=16, compression=4)
    assert small.search_space()["compression"].single()
    assert "compression" not in small.active_search_space()


def test_a_search_without_settings_is_rejected() -> None:
    recipe = AecnnRecipe(last_stage="classifier")
    with pytest.raises(UserError, match="expected settings that this search samples, which are classifier_lr"):
        searched(recipe, SearchOptions(frozen_params=("lr",)))
    with pytest.raises(UserError, match="all trials would be equal"):
        searched(recipe, SearchOptions(frozen_params=("classifier_lr", "backbone", "compression")))
