"""Measure every family's training step on this machine's GPU, or on one core, without Ray.

cxr benchmark families  # under eight minutes on a GPU

cxr benchmark families --families classify detect --seconds 2 --quick

For each family, the table has the time of a step in bfloat16, in float32, and in a bare float32 loop that waits for
the loss in every step, as published code usually has it; the fraction of the device's measured peak (MFU); and the
fraction of the time in which the loop waited for batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cxr.errors import UserError
from cxr.families import RECIPES

if TYPE_CHECKING:
    from cxr.benchmarks.throughput.family_steps import FamilyStep

# Settings of full training runs, with random weights. Those that need another network's weights are off.
FULL: dict[str, dict[str, Any]] = {
    "align": {"size": 256, "batch_size": 64, "lungs": False},
    "aecnn": {
        "size": 1024,
        "crop": 896,
        "compressor": "published",
        "backbone": "densenet121",
        "batch_size": 32,
        "first_stage": "joint",
    },
    "attend": {"size": 512, "backbone": "resnet50", "backbone_stages": 4, "batch_size": 32},
    "classify": {"size": 224, "backbone": "densenet121", "batch_size": 128},
    "detect": {"size": 640, "architecture": "yolov5m", "batch_size": 32},
    "localize": {"size": 512, "backbone": "densenet121", "pooling": "mean", "batch_size": 32},
    "lungs": {"size": 256, "warmup_size": 0, "warmup_epochs": 0, "batch_size": 64},
    "pneumothorax": {"size": 512, "architecture": "unet", "backbone": "resnet34", "batch_size": 32},
}
QUICK: dict[str, dict[str, Any]] = {
    "align": {"size": 32, "batch_size": 4, "lungs": False, "backbone": "conv3"},
    "aecnn": {"size": 32, "patch": 16, "backbone": "resnet18", "batch_size": 4, "first_stage": "joint"},
    "attend": {"size": 32, "batch_size": 4},
    "classify": {"size": 32, "batch_size": 4},
    "detect": {"size": 32, "batch_size": 4},
    "localize": {"size": 32, "batch_size": 4},
    "lungs": {"size": 32, "warmup_size": 0, "warmup_epochs": 0, "batch_size": 4},
    "pneumothorax": {"size": 32, "architecture": "small_unet", "batch_size": 4},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_families"
    """Folder or URI of the results: steps.md."""
    families: tuple[str, ...] = tuple(RECIPES)
    """Families to measure."""
    seconds: float = 5.0
    """Seconds for each measurement, of which there are three for each family."""
    data: str = ""
    """URI of shards to train from. Default: the same random images in memory in each step, which only have to be
    transferred to the device."""
    quick: bool = False
    """Use tiny networks and images; the figures are not meaningful."""


def main(options: Options) -> dict[str, Any]:
    if unknown := set(options.families) - {*RECIPES}:
        raise UserError(f"--families: expected some of {', '.join(RECIPES)}, got {' '.join(sorted(unknown))}")

    import torch

    from cxr import schema, storage
    from cxr.benchmarks.throughput import family_steps
    from cxr.benchmarks.throughput.step import PRECISIONS, peak
    from cxr.data.batch import best_device
    from cxr.families import recipe_type

    device = best_device()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    peaks = {precision: peak(precision, device, min(2.0, options.seconds)) for precision in PRECISIONS}
    settings, failed = (QUICK if options.quick else FULL), dict[str, str]()
    steps: list[FamilyStep] = []
    for family in options.families:
        recipe = recipe_type(family)(**settings[family])
        try:
            source, findings = family_steps.stream(recipe, options.data) if options.data else (None, schema.FINDINGS)
            steps.append(family_steps.measure(recipe, findings, device, options.seconds, source))
            print(f"{family}: {steps[-1].bfloat16_ms:.1f} ms per step in bfloat16", flush=True)
        except torch.OutOfMemoryError:  # the other families are measured all the same
            failed[family] = f"batches of {recipe.batch_size} images do not fit in the memory of {name}"
            print(f"note: {family}: {failed[family]}", flush=True)
    peak_text = ", ".join(f"{value:,.0f} GFLOP/s in {precision}" for precision, value in peaks.items())
    text = f"{name}; peak of matrix products: {peak_text}\n\n{family_steps.table(steps, peaks)}"
    print(text, flush=True)
    report = storage.join(storage.normalize(options.out), "steps.md")
    storage.write_text(report, text)
    measured = {key: value for step in steps for key, value in step.metrics(peaks).items()}
    return {"device": name, "peak_gflops": peaks, "metrics": measured, "failed": failed, "report": report}
