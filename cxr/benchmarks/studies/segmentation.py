"""Segmentation networks compared: their Dice, speed and size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cxr import schema, storage
from cxr.benchmarks.studies.xrays import patients_of
from cxr.data import shards
from cxr.data.batch import HAS_MASK, Columns, take, to_columns, to_device
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_size
from cxr.metrics.bootstrap import MeanInterval, mean_interval
from cxr.metrics.segmentation import dice, image_level, overlap_rows, summary
from cxr.metrics.segmentation.overlap_metrics import TRUE
from cxr.models.receptive_field import ArchitectureSummary, summarize_architecture
from cxr.models.segmentation_model import SegmentationModel
from cxr.sources import rle

BATCH = 16
TIMED = 9  # number of timed forward passes, whose median is reported
_IDENTITY = {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}  # a resize transform


@dataclass(frozen=True)
class MaskedXRays:
    """Stored images whose mask is known; row i of each array belongs to image i."""

    pixels: np.ndarray  # (N, size, size) uint8 or uint16
    masks: np.ndarray  # (N, size² / 8) uint8, packed
    patients: np.ndarray  # (N,) ids; an image with an unknown patient counts as a patient of its own

    @property
    def size(self) -> int:
        return self.pixels.shape[-1]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels as stored and bool masks (B, size, size)."""
        for start in range(0, len(self.pixels), BATCH):
            packed = self.masks[start : start + BATCH]
            masks = np.unpackbits(packed, axis=1, count=self.size**2).reshape(-1, self.size, self.size)
            yield torch.from_numpy(self.pixels[start : start + BATCH].copy()), torch.from_numpy(masks == 1)


def read(uri: str, split: str, label: str, limit: int = 0) -> MaskedXRays:
    """Images of a split of shards whose mask of `label` is known.

    Args:
        limit: maximum number of images, spread evenly over the split; 0 for all.

    Raises:
        UserError: there are no shards, or no such image.
    """
    info = shards.read_info(uri)
    parts: list[tuple[Columns, np.ndarray]] = []
    for file in info.parts.get(split, ()):
        names = [schema.IMAGE_ID, schema.PATIENT_ID, schema.PIXELS, schema.MASKS]
        rows = storage.read_parquet(file.uri, columns=names)
        columns = to_columns(rows, (schema.PIXELS, schema.MASKS), info.pixels, label)
        known = np.flatnonzero(columns.pop(HAS_MASK))
        parts.append((take(columns, known), patients_of(rows)[known]))
    total = sum(len(patients) for _, patients in parts)
    if not total:
        raise UserError(
            f"{uri}: none of the {info.rows(split)} images in its {split} split has a known mask of {label}: give an "
            f"archive that has such masks, and more patients"
        )
    chosen = np.linspace(0, total - 1, min(limit or total, total)).astype(int)
    pixels, masks = (
        np.concatenate([columns[name] for columns, _ in parts]) for name in (schema.PIXELS, schema.MASKS)
    )
    return MaskedXRays(pixels[chosen], masks[chosen], np.concatenate([of for _, of in parts])[chosen])


@dataclass(frozen=True)
class SegmentationResult:
    """Results of the networks of one recipe, one per seed, on the test images."""

    name: str
    figures: dict[str, float]  # means over seeds, see `metrics.segmentation.summary` and `image_level`
    dice: MeanInterval  # by patient; each image's value is its mean over seeds
    positive_dice: MeanInterval  # of the images with a true mask
    dice_sd: float  # standard deviation of the mean Dice over seeds; NaN with one seed
    architecture: ArchitectureSummary
    forward_ms: float  # of one image

    def row(self) -> dict[str, Any]:
        """All results as plain values, for a CSV file."""
        ends = {
            f"{name}_{end}": getattr(of, end)
            for name, of in (("dice", self.dice), ("positive_dice", self.positive_dice))
            for end in ("low", "high")
        }
        details = {"dice_sd": self.dice_sd, "forward_ms": self.forward_ms, **asdict(self.architecture)}
        return {"network": self.name, **self.figures, **ends, **details}


def evaluate(
    name: str, networks: Sequence[Checkpoint], xrays: MaskedXRays, device: torch.device
) -> SegmentationResult:
    """Predict masks with each network, as scoring does, and compare them with the true ones at their stored size.

    Raises:
        UserError: the images are smaller than the networks need.
    """
    predictions = [_predict(network, xrays, device) for network in networks]
    figures = [summary(rows) | image_level(rows, probability) for rows, probability in predictions]
    dice_N = np.mean([dice(rows).numpy() for rows, _ in predictions], axis=0)
    positive_N = predictions[0][0][:, TRUE].numpy() > 0
    means = [of_seed["dice"] for of_seed in figures]
    model = _model(networks[0])
    return SegmentationResult(
        name=name,
        figures={key: float(np.mean([of_seed[key] for of_seed in figures])) for key in figures[0]},
        dice=mean_interval(dice_N, xrays.patients),
        positive_dice=mean_interval(np.where(positive_N, dice_N, np.nan), xrays.patients),
        dice_sd=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        architecture=summarize_architecture(model.segmenter, model.segmenter.encoder_path()),
        forward_ms=forward_ms(model, networks[0].recipe.size, device),
    )


def _model(network: Checkpoint) -> SegmentationModel:
    assert isinstance(network.network, SegmentationModel)
    return network.network


@torch.inference_mode()
def _predict(checkpoint: Checkpoint, xrays: MaskedXRays, device: torch.device) -> tuple[Tensor, Tensor]:
    """Overlap rows (N, 4) at the stored size, and each image's probability (N,)."""
    check_size(checkpoint.recipe, xrays.size)
    network, overlaps, probabilities = checkpoint.network.to(device), [], []
    for pixels, true in xrays.batches():
        predicted = checkpoint.recipe.predict(network, to_device({schema.PIXELS: pixels}, device))
        context = ScoringContext(checkpoint.findings, xrays.size)
        scores = checkpoint.recipe.scored(predicted, _as_stored(len(pixels), xrays.size), context)
        masks = [rle.decode(code, xrays.size, xrays.size) for code in scores[schema.PRED_MASK_RLE].to_pylist()]
        overlaps.append(overlap_rows(torch.from_numpy(np.stack(masks)), true))
        probabilities.append(torch.tensor(scores[schema.PRED_MASK_PROBABILITY].to_numpy()))
    return torch.cat(overlaps), torch.cat(probabilities)


def _as_stored(count: int, size: int) -> pa.Table:
    """Rows for scoring at the stored size: identity transforms."""
    known = {
        schema.RESIZE_TRANSFORM: [_IDENTITY] * count,
        schema.HEIGHT_PX: [size] * count,
        schema.WIDTH_PX: [size] * count,
    }
    return pa.table(known)


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
