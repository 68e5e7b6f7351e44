"""Comparison of aligners by the overlap of lungs: no alignment, ECC, a checkpoint, and the best affine transform.

All methods see the same images. The metric is the mean intersection over union (IoU) of the lung masks of all pairs
of transformed images. Each method is free to choose its common frame, so its mean transform is removed first:
otherwise zooming in would increase the IoU. What a transform moves out of the image is lost and lowers the IoU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cxr import schema
from cxr.benchmarks.studies import ecc
from cxr.benchmarks.studies.ecc import Ecc
from cxr.benchmarks.studies.mask_affine import align_masks
from cxr.data.batch import NO_MASK, to_columns, to_tensors
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_size
from cxr.metrics.alignment import centered, iou_matrix, off_diagonal_mean, resampled_pair_means
from cxr.models.spatial_transformer import identity, warp
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.splits import hash_values
from cxr.storage import normalize

ROTATION_DEG, SCALE, SHIFT = (
    15.0,
    0.2,
    0.1,
)  # maximum rotation; zoom from 1 − SCALE to 1 + SCALE; maximum shift as a fraction of the width
RESAMPLES = 2000
GIVEN, ECC, CXR, BEST = "given", "ecc", "cxr", "best_affine"
_BLOCK = 64  # images that are decoded at a time
_BATCH = 32  # images that are aligned at a time

Half = Literal["all", "development", "test"]
"""Which patients' images are compared. Settings are chosen on the development half, and results are those of the test
half."""
_HALF_SEED = 1  # of the hash that divides the patients; other than that of the splits


@dataclass(frozen=True)
class Masked:
    """Images with lung masks."""

    image_ids: list[str]
    sources: list[str]  # the archive layout of each
    pixels: Tensor  # (B, H, W) uint8
    masks: Tensor  # (B, H, W) bool

    def __len__(self) -> int:
        return len(self.image_ids)

    def transformed(self, theta: Tensor) -> Masked:
        """The images after the transforms `theta` (B, 2, 3)."""
        images = warp(self.pixels[:, None].float(), theta)[:, 0].round().to(torch.uint8)
        return Masked(self.image_ids, self.sources, images, warp_masks(self.masks, theta))


@dataclass(frozen=True)
class AlignmentComparison:
    """Results of the methods on the same images."""

    theta: dict[str, Tensor]  # method -> (B, 2, 3), output to image, mean removed
    iou: dict[str, Tensor]  # method -> (B, B)
    seconds: dict[str, float] = field(default_factory=dict)  # method -> CPU time of one thread per image


def read(archives: Sequence[str], size: int, limit: int = 0, half: Half = "all") -> tuple[Masked, list[str]]:
    """Every image of the archives that has a lung mask, in squares of `size` px, and notes on images left out.

    Args:
        limit: maximum number of images of each archive; 0 for all.
        half: which patients; a hash of the patient's id decides.

    Raises:
        UserError: fewer than two images with masks, or an archive that cannot be opened.
    """
    parts, notes = [], []
    for archive in archives:
        part, left_out = _read(archive, PixelFormat(size), limit, half)
        parts.append(part)
        notes += left_out
    images = Masked(
        [image_id for part in parts for image_id in part.image_ids],
        [source for part in parts for source in part.sources],
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.masks for part in parts]),
    )
    if len(images) < 2:
        raise UserError(f"{', '.join(archives)}: expected at least 2 images with a lung mask, got {len(images)}")
    return images, notes


def _read(archive: str, pixels: PixelFormat, limit: int, half: Half) -> tuple[Masked, list[str]]:
    table = open_manifest(archive).table
    if half != "all":
        development = hash_values(table[schema.PATIENT_ID].combine_chunks(), _HALF_SEED) < 0.5
        table = table.filter(pa.array(development == (half == "development")))
    table = table.slice(0, limit or None)
    if not len(table):
        none = torch.empty((0, pixels.size, pixels.size), dtype=torch.uint8)
        return Masked([], [], none, none.bool()), []
    blocks = [_block(table.slice(start, _BLOCK), pixels) for start in range(0, len(table), _BLOCK)]
    image_ids = [image_id for ids, _, _ in blocks for image_id in ids]
    images, masks = torch.cat([block[1] for block in blocks]), torch.cat([block[2] for block in blocks])
    source = find_source(normalize(archive)).name
    left_out = len(table) - len(image_ids)
    note = (
        f"{archive}: {left_out} of {len(table)} images left out because they cannot be decoded or have no lung mask"
    )
    return Masked(image_ids, [source] * len(image_ids), images, masks), [note] if left_out else []


def _block(manifest: pa.Table, pixels: PixelFormat) -> tuple[list[str], Tensor, Tensor]:
    """Ids, pixels and bool masks of the images that have both."""
    rows = make_rows(manifest, pixels, threads=1)
    rows = rows.filter(rows[schema.ERROR].is_null())
    batch = to_tensors(to_columns(rows, [schema.PIXELS, schema.MASKS], pixels), pixels)
    present = batch[schema.MASKS][:, 0, 0] != NO_MASK
    ids = [image_id for image_id, known in zip(rows[schema.IMAGE_ID].to_pylist(), present, strict=True) if known]
    return ids, batch[schema.PIXELS][present], batch[schema.MASKS][present].bool()


def random_poses(image_ids: Sequence[str], seed: int) -> Tensor:
    """(B, 2, 3) similarities, sampled uniformly (rotation, zoom, shift) from the seed and the image id only."""
    return torch.stack([_random_pose(f"{seed}:{image_id}") for image_id in image_ids])


def _random_pose(key: str) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    turn, zoom, x, y = np.random.default_rng(int.from_bytes(digest, "big")).uniform(-1, 1, 4)
    angle, scale = math.radians(ROTATION_DEG) * turn, 1 + SCALE * zoom
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cos, -sin, 2 * SHIFT * x], [sin, cos, 2 * SHIFT * y]], dtype=torch.float32)


def compare(images: Masked, aligner: Checkpoint, settings: Ecc) -> AlignmentComparison:
    """All methods on the same images. Times are CPU seconds of one thread, without decoding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        registered = ecc.align(images.pixels.numpy(), settings)
        predicted, seconds_cxr = predict(aligner, images.pixels)
    finally:
        torch.set_num_threads(threads)
    theta = {
        GIVEN: identity(len(images)),
        ECC: registered.theta,
        CXR: predicted,
        BEST: align_masks(images.masks),
    }
    seconds = {ECC: registered.seconds_per_image, CXR: seconds_cxr}
    return overlaps(images, theta, seconds)


def overlaps(
    images: Masked, thetas: dict[str, Tensor], seconds: dict[str, float] | None = None
) -> AlignmentComparison:
    """Overlaps after each method's transforms, whose mean is removed first."""
    free = {method: centered(theta, theta.mean(0, keepdim=True)) for method, theta in thetas.items()}
    iou = {method: iou_matrix(warp_masks(images.masks, theta)) for method, theta in free.items()}
    return AlignmentComparison(free, iou, seconds or {})


@torch.inference_mode()
def predict(aligner: Checkpoint, pixels: Tensor) -> tuple[Tensor, float]:
    """Transforms (B, 2, 3) that an aligner's checkpoint predicts for uint8 images, and the seconds per image.

    Raises:
        UserError: the checkpoint is of another family, or needs larger images.
    """
    if schema.THETA not in aligner.recipe.score_columns.names:
        raise UserError(f"{aligner.uri}: expected a checkpoint of family 'align', got {aligner.recipe.family!r}")
    check_size(aligner.recipe, pixels.shape[-1])
    start = time.thread_time()
    parts = [
        aligner.recipe.predict(aligner.network, {schema.PIXELS: part})[schema.THETA] for part in pixels.split(_BATCH)
    ]
    theta = torch.cat(parts).reshape(-1, 2, 3).float()
    return theta, (time.thread_time() - start) / len(pixels)


def metrics(
    comparison: AlignmentComparison, sources: Sequence[str], ending: str = "", seed: int = 0
) -> dict[str, float]:
    """`iou_<method>` over all pairs and `iou_<method>_<source>` over those within each source; the gain over ECC.

    `gain_over_ecc_low` and `_high` are the ends of its 95 % interval by bootstrap over images.
    """
    results = {f"iou_{method}{ending}": float(off_diagonal_mean(iou)) for method, iou in comparison.iou.items()}
    for source in sorted(set(sources)):
        rows = torch.tensor([i for i, image_source in enumerate(sources) if image_source == source])
        for method, iou in comparison.iou.items():
            results[f"iou_{method}_{source}{ending}"] = float(off_diagonal_mean(iou[rows][:, rows]))
    low, high = gain_interval(comparison.iou[CXR], comparison.iou[ECC], seed)
    gain = results[f"iou_{CXR}{ending}"] - results[f"iou_{ECC}{ending}"]
    results |= {f"gain_over_ecc{ending}": gain}
    results |= {f"gain_over_ecc_low{ending}": low, f"gain_over_ecc_high{ending}": high}
    return results | {f"seconds_per_image_{method}{ending}": value for method, value in comparison.seconds.items()}


def gain_interval(better_BB: Tensor, worse_BB: Tensor, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the difference of two mean pairwise IoUs, from resampled images."""
    difference = (better_BB - worse_BB).double().numpy()
    count = len(difference)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    gains = resampled_pair_means(difference, times.T)
    low, high = np.quantile(gains[np.isfinite(gains)], [0.025, 0.975])
    return float(low), float(high)


def transforms(images: Masked, comparison: AlignmentComparison, poses: Tensor) -> pa.Table:
    """One row per image: id, source, the transform (2 x 3) that was applied, and each method's transform after it."""
    named = {"pose": poses} | {f"theta_{method}": theta for method, theta in comparison.theta.items()}
    columns = {
        f"{name}_unit": pa.FixedSizeListArray.from_arrays(pa.array(theta.reshape(-1).numpy()), 6)
        for name, theta in named.items()
    }
    return pa.table({schema.IMAGE_ID: images.image_ids, "source": images.sources, **columns})


def warp_masks(masks: Tensor, theta: Tensor) -> Tensor:
    """Bool masks after the transforms `theta` (B or 1, 2, 3)."""
    return warp(masks[:, None].float(), theta)[:, 0] > 0.5
