"""The training step of any family on one device, without Ray: in both precisions, and in a bare loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, repeat

import torch

from cxr import storage
from cxr.benchmarks.throughput.bare_loop import BareLoop
from cxr.benchmarks.throughput.step import operations, synthetic_batch
from cxr.data import shards
from cxr.data.batch import Batch, to_device
from cxr.data.shard_loader import ShardStream
from cxr.families.base import Recipe, SingleProcess
from cxr.families.capabilities import BatchLookahead
from cxr.families.compatibility import check_pixels
from cxr.reporting.tables import markdown
from cxr.training.engine import Engine, EpochSoFar

WARM_UP = 3  # steps before the measurement: they choose algorithms and fill caches
CHUNK = 4  # steps between two looks at the clock


@dataclass(frozen=True)
class FamilyStep:
    """The training step of a recipe on one device."""

    family: str
    batch_size: int
    gflop_per_image: float  # forward and backward, multiplications and additions
    bfloat16_ms: float  # per step
    float32_ms: float
    bare_ms: float  # of a float32 loop that waits for the loss in every step
    waited: float  # fraction of the bfloat16 steps in which the host waited for batches

    def images_per_s(self, milliseconds: float) -> float:
        return 1000 * self.batch_size / milliseconds

    def share_of(self, peak_gflops: float, milliseconds: float) -> float:
        """Fraction of the device's measured peak (model FLOPs utilization)."""
        return self.images_per_s(milliseconds) * self.gflop_per_image / peak_gflops

    def metrics(self, peaks: dict[str, float]) -> dict[str, float]:
        """Values by name, FAMILY/NAME."""
        values = {name: value for name, value in vars(self).items() if name != "family"}
        values["bfloat16_mfu"] = self.share_of(peaks["bfloat16"], self.bfloat16_ms)
        values["float32_mfu"] = self.share_of(peaks["float32"], self.float32_ms)
        values["speedup_over_bare_loop"] = self.bare_ms / self.bfloat16_ms
        return {f"{self.family}/{name}": float(value) for name, value in values.items()}


def measure(
    recipe: Recipe, findings: tuple[str, ...], device: torch.device, seconds: float, batches: Iterator[Batch] | None
) -> FamilyStep:
    """Measure the first stage's step for so many seconds in each precision and in the bare loop.

    Args:
        batches: endless batches on the host, for example read from shards; None: the same random batch again and
            again, of which only the transfer takes time.
    """
    batch = synthetic_batch(recipe, recipe.batch_size, findings)
    source = batches or repeat(batch)
    in_bfloat16, waited = _engine_ms(recipe.replace(precision="bfloat16"), findings, device, seconds, source, batch)
    in_float32, _ = _engine_ms(recipe.replace(precision="float32"), findings, device, seconds, source, batch)
    return FamilyStep(
        family=recipe.family,
        batch_size=recipe.batch_size,
        gflop_per_image=operations(recipe, findings),
        bfloat16_ms=in_bfloat16,
        float32_ms=in_float32,
        bare_ms=_bare_ms(recipe.replace(precision="float32"), findings, device, seconds, batch),
        waited=waited,
    )


def _engine_ms(
    recipe: Recipe,
    findings: tuple[str, ...],
    device: torch.device,
    seconds: float,
    source: Iterator[Batch],
    first: Batch,
) -> tuple[float, float]:
    """Milliseconds per step of the training loop, and the fraction of them in which it waited for batches."""
    torch.manual_seed(0)
    task = recipe.task(recipe.network(findings))
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=1_000_000, device=device)
    task.begin(lambda: engine.moved(iter([first])), engine.workers)
    chunks: list[EpochSoFar] = []

    def steps(number: int) -> None:
        chunks.append(EpochSoFar())
        engine.epoch(islice(source, number), chunks[-1])

    milliseconds = _timed(steps, seconds, device)
    return milliseconds, sum(chunk.waited for chunk in chunks[1:]) / sum(chunk.seconds for chunk in chunks[1:])


def _bare_ms(recipe: Recipe, findings: tuple[str, ...], device: torch.device, seconds: float, batch: Batch) -> float:
    """Milliseconds per step of a loop as published code usually has it: float32, and the loss read in each step."""
    torch.manual_seed(0)
    loop = BareLoop(recipe.task(recipe.network(findings)), recipe, device)
    task = loop.task
    task.begin(lambda: iter([to_device(batch, device)]), SingleProcess())
    look_ahead = task.look_ahead if isinstance(task, BatchLookahead) else iter

    def steps(number: int) -> None:
        for _ in range(number):
            loss = loop([*look_ahead(iter([to_device(batch, device)]))])
            assert math.isfinite(loss.item())  # the host waits for the device

    return _timed(steps, seconds, device)


def _timed(steps: Callable[[int], None], seconds: float, device: torch.device) -> float:
    """Milliseconds per step, of as many steps as fit into the time."""
    steps(WARM_UP)
    _wait(device)
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < seconds:
        steps(CHUNK)
        _wait(device)
        done += CHUNK
    return 1000 * (time.perf_counter() - start) / done


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream(recipe: Recipe, data: str) -> tuple[Iterator[Batch], tuple[str, ...]]:
    """Endless training batches from shards, without Ray, and the findings of the shards."""
    info = shards.read_info(storage.normalize(data))
    check_pixels(info, recipe, None)
    read = ShardStream(
        info,
        "train",
        recipe.columns,
        batch_size=recipe.batch_size,
        cache_bytes=1 << 28,
        mask_label=recipe.mask_label,
    )
    return chain.from_iterable(read.train(epoch) for epoch in count()), info.findings


def table(steps: Sequence[FamilyStep], peaks: Mapping[str, float]) -> str:
    """Markdown: one row per family."""
    head = (
        *("family", "batch", "GFLOP per image", "bfloat16, ms", "images/s", "MFU", "float32, ms", "MFU"),
        *("bare loop, ms", "speed-up over it", "waiting for data"),
    )
    rows = [
        [
            step.family,
            f"{step.batch_size}",
            f"{step.gflop_per_image:.2f}",
            f"{step.bfloat16_ms:.1f}",
            f"{step.images_per_s(step.bfloat16_ms):,.0f}",
            f"{step.share_of(peaks['bfloat16'], step.bfloat16_ms):.0%}",
            f"{step.float32_ms:.1f}",
            f"{step.share_of(peaks['float32'], step.float32_ms):.0%}",
            f"{step.bare_ms:.1f}",
            f"{step.bare_ms / step.bfloat16_ms:.2f}",
            f"{step.waited:.1%}",
        ]
        for step in steps
    ]
    return markdown(head, rows)
