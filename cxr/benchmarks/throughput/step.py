"""A training step compared with the device's peak: images per second, operations per image, utilization (MFU).

Imports no Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from cxr import schema
from cxr.data.batch import HAS_BOXES, Batch
from cxr.families.base import Recipe, SingleProcess
from cxr.families.capabilities import BatchLookahead
from cxr.training.engine import casts

SIDE = {"cpu": 1024, "cuda": 8192}  # side of the square matrices for measuring a device's peak
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Step:
    """Throughput of a recipe's training step in one precision."""

    precision: str
    images_per_s: float  # through Ray Train
    bare_images_per_s: float
    gflop_per_image: float  # forward and backward, multiplications and additions
    peak_gflops: float  # peak: product of large matrices on the same device

    @property
    def ratio_to_bare_loop(self) -> float:
        return self.images_per_s / self.bare_images_per_s

    @property
    def mfu(self) -> float:
        """Fraction of the peak that the step reaches (model FLOPs utilization)."""
        return self.images_per_s * self.gflop_per_image / self.peak_gflops

    def metrics(self) -> dict[str, float]:
        values = vars(self) | {"ratio_to_bare_loop": self.ratio_to_bare_loop, "mfu": self.mfu}
        return {f"{self.precision}/{name}": value for name, value in values.items() if name != "precision"}


def synthetic_batch(recipe: Recipe, rows: int, findings: tuple[str, ...]) -> Batch:
    """Random images of a recipe's size, with half of a mask, a box in each image, and labels that alternate."""
    random = torch.Generator().manual_seed(0)
    masks = torch.zeros(rows, recipe.size, recipe.size, dtype=torch.uint8)
    masks[:, : recipe.size // 2] = 1
    boxes = torch.full((rows, schema.MOST_BOXES, 5), torch.nan)
    boxes[:, 0] = torch.tensor([0.0, 0.2, 0.2, 0.6, 0.7])
    batch: Batch = {
        schema.PIXELS: torch.randint(0, 255, (rows, recipe.size, recipe.size), generator=random).to(torch.uint8),
        schema.LABELS: (torch.arange(rows)[:, None] % 2).expand(-1, len(findings)).to(torch.int8).contiguous(),
        schema.MASKS: masks,
        schema.BOXES: boxes,
        HAS_BOXES: torch.ones(rows, dtype=torch.bool),
        schema.TRUE_THETA: torch.full((rows, 6), torch.nan),
        schema.IMAGE_ID: torch.arange(rows),
    }
    needed = {*recipe.columns, *([HAS_BOXES] if schema.BOXES in recipe.columns else [])}
    return {name: values for name, values in batch.items() if name in needed}


def operations(recipe: Recipe, findings: tuple[str, ...]) -> float:
    """GFLOP per image of a step of the recipe's first stage: convolutions and matrix products."""
    task = recipe.task(recipe.network(findings)).train()
    batch = synthetic_batch(recipe, 2, findings)
    task.begin(lambda: iter([batch]), SingleProcess())
    task.enter_stage(recipe.stages()[0].name)
    if isinstance(task, BatchLookahead):
        (batch,) = task.look_ahead(iter([batch]))
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(task(task.augment(batch)).values())).sum().backward()
    return counter.get_total_flops() / len(batch[schema.PIXELS]) / 1e9


def peak(precision: str, device: torch.device, seconds: float = 2.0) -> float:
    """GFLOP/s of products of square matrices in the type that training computes in with this precision; on a CPU with
    one thread. CPUs without bfloat16 instructions train in float32 in any case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    side = SIDE[device.type]
    dtype = torch.bfloat16 if casts(precision, device) else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    _products(a, b, 3)
    count, taken = 0, 0.0
    while taken < seconds:
        taken += _products(a, b, 10)
        count += 10
    torch.set_num_threads(threads)
    return 2 * side**3 * count / taken / 1e9


def _products(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
