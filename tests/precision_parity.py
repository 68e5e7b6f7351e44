"""Predictions in bfloat16 compared with those in float32, on phantoms. Imports no Ray, for machines with a GPU."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxr import schema
from cxr.families.base import Recipe, SingleProcess
from cxr.inference.options import Precision
from cxr.inference.scorer import Scorer
from cxr.phantom.archive import make_exam
from cxr.training.engine import Engine
from tests.families.test_recipes import SMALL, some_batches

SIZE, PHANTOMS, STEPS, BATCH = 64, 256, 250, 16


@functools.cache
def phantoms() -> tuple[Tensor, Tensor]:
    """Pixels (N, size, size) and labels (N, F)."""
    made = [make_exam(number, size=SIZE).phantom for number in range(PHANTOMS)]
    labels = [[finding in phantom.labels for finding in schema.FINDINGS] for phantom in made]
    return torch.from_numpy(np.stack([phantom.pixels for phantom in made])), torch.tensor(labels, dtype=torch.int8)


def shown() -> Tensor:
    """1,024 different images: phantoms, their mirror images, and both moved by two pixels."""
    pixels, _ = phantoms()
    both = torch.cat([pixels, pixels.flip(-1)])
    return torch.cat([both, both.roll(2, -2)])


def trained(recipe: Recipe, device: torch.device) -> Any:
    """A checkpoint of a classifier that has learned from phantoms, with thresholds chosen on them."""
    recipe = recipe.replace(size=SIZE, batch_size=BATCH, precision="float32")
    pixels, labels = phantoms()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    task = recipe.task(recipe.network(schema.FINDINGS))

    def batch(index: Tensor) -> dict[str, Tensor]:
        return {
            **{name: values[:1].repeat(len(index), *[1] * (values.ndim - 1)) for name, values in _others().items()},
            schema.PIXELS: pixels[index],
            schema.LABELS: labels[index],
            schema.IMAGE_ID: index,
        }

    def batches() -> Any:
        return iter([batch(torch.arange(PHANTOMS))])

    task.begin(batches, SingleProcess())
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=STEPS, device=device, stage=recipe.stages()[-1])
    engine.epoch(batch(torch.randperm(PHANTOMS, generator=generator)[:BATCH]) for _ in range(STEPS))
    engine.finish_epoch(batches)
    network = engine.shipped().eval()
    return SimpleNamespace(
        recipe=recipe, findings=schema.FINDINGS, network=network, uri="", about={"sha256": ""}, thresholds={}
    )


def _others() -> dict[str, Tensor]:
    """Columns that a batch may need, of an image without known boxes and masks."""
    columns = next(some_batches(1, 2, SIZE))
    columns[schema.BOXES] = torch.full_like(columns[schema.BOXES], float("nan"))
    columns[schema.MASKS] = torch.full_like(columns[schema.MASKS], 255)
    return columns


def untrained(family: str) -> Any:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    recipe = SMALL[family]
    network = recipe.network(schema.FINDINGS).eval()
    return SimpleNamespace(
        recipe=recipe, findings=schema.FINDINGS, network=network, uri="", about={"sha256": ""}, thresholds={}
    )


def predictions(model: Any, device: torch.device, precision: Precision, pixels: Tensor) -> dict[str, Tensor]:
    """What a scorer predicts, before scores are made of it, in float32 on the CPU."""
    scorer = Scorer(model, device, 64, precision=precision)
    parts = [scorer.predict({schema.PIXELS: part.to(device)}) for part in pixels.split(64)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


def check_trained(recipe: Recipe, device: torch.device) -> None:
    """Probabilities differ by less than .01 (999 of 1,000 do, and none by .03), and decisions on fewer than one in
    1,000 images."""
    model = trained(recipe, device)
    exact, rounded = (predictions(model, device, precision, shown()) for precision in ("float32", "bfloat16"))
    difference_NF = (exact[schema.PROBABILITIES] - rounded[schema.PROBABILITIES]).abs()
    changed_N = (exact[schema.DECISIONS] != rounded[schema.DECISIONS]).any(1)
    assert exact[schema.PROBABILITIES].std() > 0.05  # the network has learned something
    assert 0 < difference_NF.max() < 0.03
    assert difference_NF.flatten().quantile(0.999) < 0.01
    assert changed_N.sum() < len(changed_N) / 1000


def check_untrained(family: str, device: torch.device) -> None:
    """Every value that a family predicts differs by less than .01."""
    model = untrained(family)
    pixels = next(some_batches(rows=8))[schema.PIXELS]
    exact, rounded = (predictions(model, device, precision, pixels) for precision in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    for name, values in exact.items():
        if name == "logits":
            torch.testing.assert_close(rounded[name].sigmoid(), values.sigmoid(), atol=0.01, rtol=0)
        elif name == "predictions":  # boxes, best first: with random weights, none is better than its neighbors
            torch.testing.assert_close(rounded[name][..., 4], values[..., 4], atol=0.01, rtol=0, equal_nan=True)
        elif name not in (schema.DECISIONS, "heat"):
            torch.testing.assert_close(rounded[name], values, atol=0.01, rtol=0, equal_nan=True)
