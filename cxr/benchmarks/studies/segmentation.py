"""Segmentation networks compared: their Dice, speed and size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cxr.evaluation.segmentation_data import SegmentationEvaluation
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import MeanInterval, mean_interval
from cxr.metrics.segmentation import dice, image_level, summary
from cxr.metrics.segmentation.overlap_metrics import TRUE
from cxr.models.receptive_field import ArchitectureSummary, summarize_architecture
from cxr.models.segmentation_model import SegmentationModel

TIMED = 9  # number of timed forward passes, whose median is reported


@dataclass(frozen=True)
class SegmentationResult:
    """Results of the networks of one recipe, one per seed, on the test images."""

    name: str
    figures: dict[str, float]  # means over seeds: `metrics.segmentation.summary`, `image_level`, and hd95_px
    dice: MeanInterval  # by patient; each image's value is its mean over seeds
    positive_dice: MeanInterval  # of the images with a ground-truth mask
    dice_sd: float  # standard deviation of the mean Dice over seeds; NaN with one seed
    architecture: ArchitectureSummary
    forward_ms: float  # of one image

    @property
    def all_positive(self) -> bool:
        """Whether every image has a ground-truth mask, as with lungs. Then no figure compares images with and without
        one."""
        return self.figures["positives"] == self.figures["images"]

    def row(self) -> dict[str, Any]:
        """All results as plain values, for a CSV file."""
        ends = {
            f"{name}_{end}": getattr(of, end)
            for name, of in (("dice", self.dice), ("positive_dice", self.positive_dice))
            for end in ("low", "high")
        }
        details = {"dice_sd": self.dice_sd, "forward_ms": self.forward_ms, **asdict(self.architecture)}
        return {"network": self.name, **self.figures, **ends, **details}


def summarize(
    name: str, evaluations: Sequence[SegmentationEvaluation], network: Checkpoint, device: torch.device
) -> SegmentationResult:
    """The results of the networks of one recipe.

    Args:
        evaluations: of each seed's network, on the same images.
        network: one of them, whose architecture is described and whose forward pass is timed on the device.
    """
    figures = [_figures(of_seed) for of_seed in evaluations]
    dice_N = np.mean([dice(of_seed.overlap).numpy() for of_seed in evaluations], axis=0)
    patients, positive_N = evaluations[0].patients, evaluations[0].overlap[:, TRUE].numpy() > 0
    means = [of_seed["dice"] for of_seed in figures]
    model = network.network
    assert isinstance(model, SegmentationModel)
    return SegmentationResult(
        name=name,
        figures={key: float(np.mean([of_seed[key] for of_seed in figures])) for key in figures[0]},
        dice=mean_interval(dice_N, patients),
        positive_dice=mean_interval(np.where(positive_N, dice_N, np.nan), patients),
        dice_sd=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        architecture=summarize_architecture(model.segmenter, model.segmenter.encoder_path()),
        forward_ms=forward_ms(model, network.recipe.size, device),
    )


def _figures(of_seed: SegmentationEvaluation) -> dict[str, float]:
    """hd95_px: the mean over the images whose predicted and ground-truth masks are not empty; NaN without such an
    image."""
    measured_px = of_seed.hd95_px[np.isfinite(of_seed.hd95_px)]
    return {
        **summary(of_seed.overlap),
        **image_level(of_seed.overlap, torch.from_numpy(of_seed.probabilities)),
        "hd95_px": float(measured_px.mean()) if len(measured_px) else math.nan,
    }


@torch.inference_mode()
def forward_ms(network: torch.nn.Module, size: int, device: torch.device) -> float:
    """Median time of a forward pass of one image, milliseconds; one thread on a CPU."""
    network, x = network.eval().to(device), torch.rand(1, 1, size, size, device=device)
    times = []
    with _one_thread():
        for _ in range(TIMED + 2):  # the first ones choose algorithms and fill caches
            start = time.perf_counter()
            network(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[2:]))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def metrics(results: Sequence[SegmentationResult]) -> dict[str, float]:
    """Metrics by name, NETWORK_METRIC, without those that could not be measured."""
    values = {
        f"{result.name}_{name}": value
        for result in results
        for name, value in result.row().items()
        if name != "network"
    }
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}
