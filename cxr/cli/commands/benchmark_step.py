"""Measure an AE-CNN's joint training step, with Ray Train and in a bare loop, relative to the device's peak.

cxr benchmark step  # on one core, or on a GPU if there is one

cxr benchmark step --size 1024 --crop 896 --compressor published --backbone densenet201 --batch-size 64
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch

from cxr import storage
from cxr.benchmarks.throughput.step import PRECISIONS, Step, operations, peak
from cxr.benchmarks.throughput.training import both_paces
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import ensure_shards
from cxr.data import shards
from cxr.families.aecnn import AecnnRecipe
from cxr.reporting.tables import markdown
from cxr.runtime import cluster


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_step"
    """Folder or URI of result.json and of the phantoms for training."""
    steps: int = 6
    """Number of steps per round."""
    rounds: int = 5
    """Number of alternating rounds; the median is reported."""
    images: int = 200
    """Number of phantoms for training."""
    recipe: AecnnRecipe = field(default_factory=lambda: AecnnRecipe(first_stage="joint"))


def main(options: Options) -> dict[str, Any]:
    cluster.connect()
    out = storage.normalize(options.out)
    data = ensure_shards(ArchiveOptions(phantoms=options.images, stored_size=options.recipe.size), out)
    findings = shards.read_info(data).findings
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    done = operations(options.recipe, findings)
    steps = []
    for precision in PRECISIONS:
        recipe = options.recipe.replace(precision=precision)
        with tempfile.TemporaryDirectory(prefix="cxr-step-") as scratch:
            ours, bare = both_paces(recipe, data, options.steps, options.rounds, scratch, gpu=gpu)
        steps.append(Step(precision, ours, bare, done, peak(precision, device)))
    name = torch.cuda.get_device_name() if gpu else "one core"
    print(f"{name}, batches of {options.recipe.batch_size}\n{_table(steps)}", flush=True)
    return {"device": name, "metrics": {k: v for step in steps for k, v in step.metrics().items()}}


def _table(steps: list[Step]) -> str:
    head = ["precision", "images/s", "bare loop", "ratio", "GFLOP per image", "peak, GFLOP/s", "MFU"]
    rows = [
        [
            step.precision,
            f"{step.images_per_s:.1f}",
            f"{step.bare_images_per_s:.1f}",
            f"{step.ratio_to_bare_loop:.3f}",
            f"{step.gflop_per_image:.2f}",
            f"{step.peak_gflops:,.0f}",
            f"{step.mfu:.0%}",
        ]
        for step in steps
    ]
    return markdown(head, rows)
