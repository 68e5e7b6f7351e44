"""Transforms that an aligner's run has predicted, compared with known poses, lung masks, and the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cxr import schema
from cxr.data import shards
from cxr.errors import ImageRejectedError, UserError
from cxr.evaluation.ground_truth_masks import MaskTruth
from cxr.evaluation.run import NoGroundTruthError, Run, Split, read_scores
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics.alignment import (
    centered,
    correlations_to_mean,
    in_frame_of,
    iou_matrix,
    mean_of_others,
    pose_errors,
    unit_vectors,
)
from cxr.models.backbones import normalize_contrast
from cxr.models.spatial_transformer import compose, identity, warp
from cxr.wording import counted

COLUMNS = (
    schema.IMAGE_ID,
    schema.ERROR,
    schema.HEIGHT_PX,
    schema.WIDTH_PX,
    schema.RESIZE_TRANSFORM,
    schema.CROP_STATUS,
    schema.THETA,
)
MOST_MASKS, MOST_PICTURES = 512, 200  # images whose masks or pixels are compared
COMPARED_PX = 256  # height and width at which masks are compared
SHOWN_PX = 192  # of images, which are compared and shown
_THREADS = 4

Placed = tuple[np.ndarray, ResizeTransform]
"""A picture or mask (H, W), and the transform from its pixels to those of the original."""


@dataclass(frozen=True)
class AlignmentScores:
    """Predicted transforms of a run; rows correspond."""

    uri: str
    image_ids: pa.Array
    theta: Tensor  # (N, 2, 3), NaN for images with an error
    squares: (
        np.ndarray
    )  # (N, 4) left, top, width, height of the square that the network saw, in the original's pixels
    sizes_px: np.ndarray  # (N, 2) height and width of the original

    @property
    def good(self) -> np.ndarray:
        """(N,) bool: scored without an error."""
        return torch.isfinite(self.theta).flatten(1).all(1).numpy()


@dataclass(frozen=True)
class AlignedImages:
    """Scored images in a fixed order, and what is known about them."""

    rows: np.ndarray  # (N,) rows of the ground truth, or of the scores if there is none
    patients: np.ndarray  # (N,)
    theta: Tensor  # (N, 2, 3)
    squares: np.ndarray  # (N, 4)
    sizes_px: np.ndarray  # (N, 2)
    pose: Tensor  # (N, 2, 3) true pose, NaN if unknown
    masked: np.ndarray  # (N,) bool: the true lung mask is known
    images_with_error: int = 0
    images_without_score: int = 0

    def at(self, rows: np.ndarray) -> AlignedImages:
        """Some of these images, by their rows in ascending order."""
        selected = np.searchsorted(self.rows, rows)
        names = ("rows", "patients", "theta", "squares", "sizes_px", "pose", "masked")
        return replace(self, **{name: getattr(self, name)[selected] for name in names})

    def to_picture(self, position: int, picture: Placed) -> Tensor:
        """(1, 2, 3) maps unit coordinates of the square that the network saw to those of a picture of the image."""
        (height, width), transform = picture[0].shape, picture[1]
        left, top, own_width, own_height = self.squares[position].tolist()
        square = ResizeTransform(own_width / 2, own_height / 2, left + own_width / 2, top + own_height / 2)
        to_units = ResizeTransform(2 / width, 2 / height, -1, -1)
        matrix = square.then(transform.inverse()).then(to_units).matrix
        return torch.from_numpy(matrix.astype(np.float32))[None]

    def before_after(self, position: int, picture: Placed, theta: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """A picture or mask in the square that the network saw, and after the transform `theta` (2, 3), (size, size)
        each."""
        pixels = picture[0].astype(np.float32)
        if max(pixels.shape) > 2 * size:  # averages before sampling
            shrunk = [max(1, round(side * 2 * size / max(pixels.shape))) for side in pixels.shape]
            pixels = cv2.resize(pixels, shrunk[::-1], interpolation=cv2.INTER_AREA)
        place = self.to_picture(position, picture)
        both = torch.cat([place, compose(place, theta[None])])
        before, after = warp(torch.from_numpy(pixels).expand(2, 1, -1, -1), both, size)[:, 0]
        return before, after


def load_scores(run: Run, split: Split = "all") -> AlignmentScores:
    """A run's scores; raises UserError if its family predicts no transforms."""
    parts = read_scores(run, COLUMNS, split)
    return scores_of(pa.concat_tables(part.replace_schema_metadata() for part in parts), run)


def scores_of(table: pa.Table, run: Run) -> AlignmentScores:
    """The scores in a table of `COLUMNS` of a run."""
    theta = np.full((table.num_rows, 6), math.nan, np.float32)
    good = pc.and_(pc.is_null(table[schema.ERROR]), pc.is_valid(table[schema.THETA])).to_numpy()
    theta[good] = table[schema.THETA].filter(pa.array(good)).combine_chunks().flatten().to_numpy().reshape(-1, 6)
    sizes_px = [table[name].fill_null(0).to_numpy() for name in (schema.HEIGHT_PX, schema.WIDTH_PX)]
    return AlignmentScores(
        uri=run.uri,
        image_ids=table[schema.IMAGE_ID].combine_chunks(),
        theta=torch.from_numpy(theta).reshape(-1, 2, 3),
        squares=_squares(table, stored_size(run)),
        sizes_px=np.stack(sizes_px, 1),
    )


def stored_size(run: Run) -> int:
    """Height and width in pixels of the stored images, to which `resize_transform` refers."""
    stored = [shards.read_info(archive).pixels.size for archive in run.archives if shards.is_shards(archive)]
    return stored[0] if stored else run.input_size


def _squares(table: pa.Table, size: int) -> np.ndarray:
    """(N, 4) see `AlignmentScores.squares`; zeros for images with an error."""
    transforms = table[schema.RESIZE_TRANSFORM].to_pylist()
    lines = [
        [t["x_offset"], t["y_offset"], size * t["x_scale"], size * t["y_scale"]] if t else [0.0] * 4
        for t in transforms
    ]
    return np.array(lines, np.float64).reshape(-1, 4)


def join(scores: AlignmentScores, truth: MaskTruth) -> AlignedImages:
    """The scored images of the ground truth. Poses are unknown where the network saw a part of the image.

    Raises:
        UserError: no scored image has a known pose or lung mask; NoGroundTruthError if no image of the archive has.
    """
    places = pc.index_in(truth.image_ids, value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = places >= 0
    good = present & scores.good[places]
    rows = np.flatnonzero(good)
    known_pose = truth.table[schema.TRUE_THETA].is_valid().to_numpy()
    if not (truth.known | known_pose)[rows].any():
        error = UserError if truth.known.any() or known_pose.any() else NoGroundTruthError
        raise error(
            f"there is nothing to evaluate: {int((truth.known | known_pose).sum()):,} of "
            f"{counted(len(truth.known), 'image')} of the archive have a ground-truth pose or a lung mask, "
            f"{int(present.sum()):,} are in {scores.uri}, and {int(good.sum()):,} were scored without an error. Use "
            f"the archive that was scored, one that has poses or lung masks, or another --split"
        )
    squares, sizes_px = scores.squares[places[rows]], scores.sizes_px[places[rows]]
    pose = np.array([value or [math.nan] * 6 for value in truth.table[schema.TRUE_THETA].take(rows).to_pylist()])
    pose[squares[:, 2:].max(1) < sizes_px.max(1) - 0.5] = math.nan
    return AlignedImages(
        rows=rows,
        patients=truth.patients[rows],
        theta=scores.theta[places[rows]],
        squares=squares,
        sizes_px=sizes_px,
        pose=torch.from_numpy(pose.reshape(-1, 2, 3).astype(np.float32)),
        masked=truth.known[rows],
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
    )


def sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most this many of the rows, in ascending order."""
    return rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def read_masks(images: AlignedImages, truth: MaskTruth, rows: Sequence[int]) -> dict[int, Placed]:
    """True lung masks by row. Masks that cannot be read are left out."""

    def read(row: int) -> Placed | None:
        height, width = images.sizes_px[np.searchsorted(images.rows, row)].tolist()
        try:
            return truth.true_mask(row, height, width)
        except ImageRejectedError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        masks = dict(zip(rows, pool.map(read, rows), strict=True))
    return {row: mask for row, mask in masks.items() if mask is not None}


@dataclass(frozen=True)
class Overlaps:
    """Overlap of the lungs in pairs of images, and the mean lungs."""

    positions: np.ndarray  # (M,) of the images
    iou_before: np.ndarray  # (M, M)
    iou_after: np.ndarray  # (M, M)
    mean_before: np.ndarray  # (H, W) share of the images whose lungs are there
    mean_after: np.ndarray

    @property
    def by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) mean IoU of each image with the others, before and after."""
        before, after = (mean_of_others(torch.from_numpy(of)).numpy() for of in (self.iou_before, self.iou_after))
        return before, after


@dataclass(frozen=True)
class Correlations:
    """Images before and after alignment, and how they correlate with their mean."""

    positions: np.ndarray  # (K,) of the images
    pictures_before: np.ndarray  # (K, H, W) in [0, 1]
    pictures_after: np.ndarray
    correlation_before: np.ndarray  # (K,)
    correlation_after: np.ndarray


def evaluate_poses(images: AlignedImages) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """(N,) errors before and after alignment in percent of the width, NaN where the pose is unknown, and (N, 2, 3)
    the transforms in the frame of the known poses."""
    known = torch.isfinite(images.pose).flatten(1).all(1)
    before, after = np.full((2, len(images.rows)), math.nan)
    fitted = torch.full((len(images.rows), 2, 3), math.nan, dtype=torch.float64)
    if known.any():
        theta, pose = images.theta[known], images.pose[known]
        before[known.numpy()] = 100 * pose_errors(identity(len(pose)), pose).numpy()
        after[known.numpy()] = 100 * pose_errors(theta, pose).numpy()
        fitted[known] = in_frame_of(theta, pose)
    return before, after, fitted


def evaluate_masks(images: AlignedImages, masks: Mapping[int, Placed]) -> Overlaps | None:
    """The overlap of true lung masks, after removing the mean transform; None for fewer than two masks."""
    positions = [position for position, row in enumerate(images.rows.tolist()) if row in masks]
    if len(positions) < 2:
        return None
    theta = _centered(images)
    pairs = [
        images.before_after(position, masks[int(images.rows[position])], theta[position], COMPARED_PX)
        for position in positions
    ]
    before, after = (torch.stack(masks_of) > 0.5 for masks_of in zip(*pairs, strict=True))
    return Overlaps(
        positions=np.array(positions),
        iou_before=iou_matrix(before).double().numpy(),
        iou_after=iou_matrix(after).double().numpy(),
        mean_before=before.float().mean(0).numpy(),
        mean_after=after.float().mean(0).numpy(),
    )


def evaluate_pictures(images: AlignedImages, pictures: Mapping[int, Placed]) -> Correlations | None:
    """How images correlate with their mean, after removing the mean transform; None without pictures."""
    positions = [position for position, row in enumerate(images.rows.tolist()) if row in pictures]
    if not positions:
        return None
    theta = _centered(images)
    pairs = [
        images.before_after(position, pictures[int(images.rows[position])], theta[position], SHOWN_PX)
        for position in positions
    ]
    before, after = (torch.stack(some) for some in zip(*pairs, strict=True))
    z = normalize_contrast(before[:, None])  # first, so that 0, outside the image, is neutral after warping
    normalized = (z, warp(z, theta[positions]))
    correlations = [correlations_to_mean(unit_vectors(some)).numpy() for some in normalized]
    return Correlations(np.array(positions), before.numpy(), after.numpy(), *correlations)


def _centered(images: AlignedImages) -> Tensor:
    return centered(images.theta, images.theta.mean(0, keepdim=True))
