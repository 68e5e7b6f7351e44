"""Predictions in bfloat16 compared with those in float32, on phantoms. Imports no Ray, for machines with a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxr import schema
from cxr.boxes.overlap import iou
from cxr.families.base import Recipe, SingleProcess
from cxr.inference.options import Precision
from cxr.inference.scorer import Scorer
from cxr.phantom.archive import make_exam
from cxr.training.engine import Engine
from tests.families.test_recipes import SMALL, some_batches

SIZE, PHANTOMS, STEPS, BATCH = 64, 256, 250, 16
BOX_STEPS, BOX_SCORE, SAME_BOX = 600, 0.25, 0.9  # training steps of a detector, a threshold, an IoU


@functools.cache
def phantoms() -> tuple[Tensor, Tensor]:
    """Pixels (N, size, size) and labels (N, F)."""
    made = [make_exam(number, size=SIZE).phantom for number in range(PHANTOMS)]
    labels = [[finding in phantom.labels for finding in schema.FINDINGS] for phantom in made]
    return torch.from_numpy(np.stack([phantom.pixels for phantom in made])), torch.tensor(labels, dtype=torch.int8)


@functools.cache
def phantom_boxes() -> Tensor:
    """(N, M, 5): see `schema.BOXES`, as in batches."""
    listed = [make_exam(number, size=SIZE).phantom.boxes for number in range(PHANTOMS)]
    boxes_NM5 = torch.full((PHANTOMS, max(map(len, listed)), 5), torch.nan)
    for boxes_M5, boxes in zip(boxes_NM5, listed, strict=True):
        for row, box in zip(boxes_M5, boxes, strict=False):
            row[0] = schema.FINDINGS.index(box.label)
            row[1:] = torch.tensor(box.xyxy_px) / SIZE
    return boxes_NM5


def shown() -> Tensor:
    """1,024 different images: phantoms, their mirror images, and both moved by two pixels."""
    pixels, _ = phantoms()
    both = torch.cat([pixels, pixels.flip(-1)])
    return torch.cat([both, both.roll(2, -2)])


def trained(recipe: Recipe, device: torch.device, steps: int = STEPS) -> Any:
    """A checkpoint that has learned from phantoms, with thresholds chosen on them if it is of a classifier. Only
    detectors see boxes."""
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
            **({schema.BOXES: phantom_boxes()[index]} if recipe.family == "detect" else {}),
        }

    def batches() -> Any:
        return iter([batch(torch.arange(PHANTOMS))])

    task.begin(batches, SingleProcess())
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=steps, device=device, stage=recipe.stages()[-1])
    engine.epoch(batch(torch.randperm(PHANTOMS, generator=generator)[:BATCH]) for _ in range(steps))
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


@dataclass(frozen=True)
class ChangedBoxes:
    """How boxes above `BOX_SCORE` in one precision differ in the other."""

    boxes: int
    """In either precision."""
    unmatched: int
    """Without a box of the same finding in the other precision at an IoU of `SAME_BOX`."""
    crossing: int
    """Matched, but with scores on both sides of `BOX_SCORE`."""
    largest: float
    """Difference between the scores of matched boxes."""
    mean: float


def check_boxes(device: torch.device) -> ChangedBoxes:
    """Fewer than one in twenty boxes of a detector are missing, or below the threshold, in the other precision, and
    scores differ by less than .03."""
    model = trained(SMALL["detect"].replace(optimizer="adamw", lr=4e-3), device, BOX_STEPS)
    exact, rounded = (predictions(model, device, name, shown())["predictions"] for name in ("float32", "bfloat16"))
    boxes = unmatched = crossing = 0
    differences: list[float] = []
    for ours, others in ((exact, rounded), (rounded, exact)):
        for own_N6, other_N6 in zip(ours.numpy(), others.numpy(), strict=True):
            for box in own_N6[own_N6[:, 4] > BOX_SCORE]:
                boxes += 1
                found_N6 = other_N6[other_N6[:, 5] == box[5]]
                iou_N = iou(box[None, :4], found_N6[:, :4])[0]
                if iou_N.max(initial=0) < SAME_BOX:
                    unmatched += 1
                    continue
                score = float(found_N6[iou_N.argmax(), 4])
                crossing += score <= BOX_SCORE
                differences.append(abs(score - float(box[4])))
    assert boxes > 100  # the network has learned something
    assert unmatched + crossing < boxes / 20
    assert 0 < max(differences) < 0.03
    return ChangedBoxes(boxes, unmatched, crossing, max(differences), float(np.mean(differences)))


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
