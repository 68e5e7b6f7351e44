"""Every family on two workers: the losses and weights of one, and what differs where batch norm is each worker's own.

Nothing is random here but the images, and each stage has two steps. With batch norms of fixed statistics, losses
agree to 1e-4, and weights to 1e-3 of how far they moved. With batch norms of each worker's own four images, as on
CPUs, losses are within 25 % of one worker's, and weights end as far from one worker's as they have moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import HAS_BOXES, NO_MASK, Batch
from cxr.families import RECIPES, align, attend
from cxr.families.base import Communicator, Recipe, SingleProcess
from cxr.schema import MOST_BOXES
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine
from tests.by_family import by_family
from tests.families.test_recipes import SMALL
from tests.training.test_detect_group import fix_norms
from tests.two_workers import TwoWorkers

IMAGES, SIZE, STEPS = 8, 32, 2
FINDINGS = ("Mass", "Nodule")
STILL = {"rotation_deg": 0.0, "flip": 0.0, "max_zoom": 1.0, "translate": 0.0}
# Settings without which nothing is random.
CHANGES: dict[str, dict[str, Any]] = {
    "aecnn": {"rotation_deg": 0.0, "flip": 0.0, "patch": SIZE, "patches": 1, "data_echo_factor": 1},
    "align": {"rotation_deg": 0.0, "max_zoom": 1.0, "translate": 0.0, "identity_weight": 10.0},
    "attend": {"rotation_deg": 0.0, "max_zoom": 1.0, "translate": 0.0},
    "detect": {"mosaic": 0.0, "translate": 0.0, "scale_jitter": 0.0, "flip": 0.0, "hsv_v": 0.0},
    "classify": STILL | {"exposure": 0.0},
    "localize": STILL | {"exposure": 0.0, "context_dropout": 0.0},
    "lungs": STILL | {"elastic": 0.0, "gamma": 1.0, "contrast": 0.0, "brightness": 0.0, "noise": 0.0},
}
FIXED = {
    family: (True,) if family in ("align", "lungs") else (True, False) for family in RECIPES
}  # two have no norms
CHANGES["pneumothorax"] = CHANGES["lungs"] | {"image_weight": 1.0}


def recipe_of(family: str) -> Recipe:
    return SMALL[family].replace(batch_size=IMAGES, precision="float32", **CHANGES[family])


def some_batches(workers: Communicator) -> Iterator[Batch]:
    """Noisy images, dealt to the workers by turns: the shares differ in labels, boxes and masks.

    Two images have no finding, the first of each worker; so that the first of them is every other image's partner.
    """
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        pixels = torch.randint(255, (IMAGES, SIZE, SIZE), generator=rng)
        pixels[::2, : SIZE // 2] //= 2
        labels = torch.ones(IMAGES, 2, dtype=torch.int8)
        labels[:2], labels[3::4, 1] = 0, -1
        boxes = torch.full((IMAGES, MOST_BOXES, 5), math.nan)
        boxes[2::2, 0] = torch.tensor([0, 0.1, 0.1, 0.6, 0.7])
        masks = torch.full((IMAGES, SIZE, SIZE), NO_MASK)
        masks[1::2] = (torch.arange(SIZE) < SIZE // 3).int()
        given = {
            schema.PIXELS: pixels.to(torch.uint8),
            schema.LABELS: labels,
            schema.BOXES: boxes,
            schema.MASKS: masks.to(torch.uint8),
            schema.TRUE_THETA: torch.full((IMAGES, 6), math.nan),
            schema.IMAGE_ID: torch.arange(IMAGES),
            HAS_BOXES: torch.ones(IMAGES, dtype=torch.bool),
        }
        yield {name: values[workers.rank :: workers.size] for name, values in given.items()}


def first_partner(without_A: Tensor, first: int, count: int) -> Tensor:
    """Replaces the random choice of an image without findings by the first other one."""
    images = torch.arange(len(without_A))
    others_BA = without_A & (images != images[first : first + count, None])
    return torch.where(others_BA.any(1), others_BA.int().argmax(1), -1)


def trained(family: str, workers: Communicator, *, fixed: bool) -> tuple[list[float], Tensor, Tensor]:
    """The losses of an epoch of each stage, and all weights before and after."""
    recipe = recipe_of(family)
    torch.manual_seed(0)
    network = recipe.network(FINDINGS)
    if fixed:
        network.apply(fix_norms)
    task = recipe.task(network)
    task.begin(lambda: some_batches(workers), workers)
    before = _weights(network)
    engine = Engine(task, recipe, workers, steps_per_epoch=STEPS, device=torch.device("cpu"))
    losses = []
    for stage in recipe.stages():
        engine.enter(stage)
        losses.append(engine.epoch(some_batches(workers))["loss"])
        task.end_epoch(workers)
    return losses, before, _weights(network)


def _weights(network: nn.Module) -> Tensor:
    return torch.cat([values.detach().flatten().clone() for values in network.parameters()])


def _without_chance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(align, "random_exposure", lambda x, **_: x)
    patch.setattr(attend, "choose_partners", first_partner)


def train(_: int, family: str) -> list[tuple[list[float], Tensor, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        _without_chance(patch)
        return [trained(family, ProcessGroup(), fixed=fixed) for fixed in FIXED[family]]


@pytest.mark.parametrize("family", by_family(RECIPES))
def test_two_workers_learn_the_same_as_one(
    family: str, two_workers: TwoWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = two_workers.run(train, family)
    _without_chance(monkeypatch)
    for fixed, one, other in zip(FIXED[family], *both, strict=True):
        losses, before, after = one
        assert losses == other[0]
        assert torch.equal(after, other[2]), "one network on both workers"
        alone, started, ended = trained(family, SingleProcess(), fixed=fixed)
        assert torch.equal(before, started)
        moved = (ended - started).norm()
        assert moved > 0
        apart = float((after - ended).norm() / moved)
        assert losses == pytest.approx(alone, rel=1e-4 if fixed else 0.25)
        assert apart < (1e-3 if fixed else 2)
