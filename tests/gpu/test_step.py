"""On a GPU every family's step is that of the CPU, in bfloat16 nearly so, and channels stay last."""

from __future__ import annotations

import pytest
import torch

from cxr import schema
from cxr.recipes.base import Alone, Recipe
from cxr.train.engine import Engine, casts
from tests.test_recipes import SMALL, some_batches

pytestmark = pytest.mark.gpu


def losses(recipe: Recipe, device: str) -> list[float]:
    """Of every stage, one epoch each."""
    torch.manual_seed(0)
    task = recipe.task(recipe.network(schema.FINDINGS))
    engine = Engine(task, recipe, Alone(), steps_per_epoch=2, device=torch.device(device))
    task.begin(lambda: engine.moved(some_batches()), Alone())
    found = []
    for stage in recipe.stages():
        engine.enter(stage)
        torch.manual_seed(0)
        found.append(engine.epoch(some_batches())["loss"])
        engine.finish_epoch(some_batches)
    return found


@pytest.mark.parametrize("family", sorted(SMALL))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_a_cpu_does(family: str, precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = SMALL[family].replace(precision=precision)
    on_gpu, on_cpu = losses(recipe, "cuda"), losses(SMALL[family].replace(precision="float32"), "cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=0.5)  # augmentation is drawn on the device, by its own generator
    assert casts(precision, torch.device("cuda")) == (precision == "bfloat16")
