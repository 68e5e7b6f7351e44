"""How well a group of images is aligned: correlations, overlap of masks, distance from known poses."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.metrics.bootstrap import ENDS, RESAMPLES, MeanInterval, ratio, resample
from cxr.metrics.meters import Communicator, Mean
from cxr.models.backbones import local_mean, normalize_contrast
from cxr.models.spatial_transformer import compose, corner_distance, identity, invert, warp

SCALES = 0.6, 1.6  # mean scales beyond which a network has zoomed into a corner, or away from the chest
FARTHEST = 0.2  # share of the width by which the middle of the common frame may lie off the images' middle


def unit_vectors(x_B1HW: Tensor) -> Tensor:
    """Each image as a vector (B, H·W) of mean 0 and length 1; the dot product of two is their correlation."""
    x = x_B1HW.flatten(1).float()
    return F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-6)


def correlation_to_mean(mean_unit_vector: Tensor) -> float:
    """Mean over images of the correlation with their common mean, from the mean of `unit_vectors`.

    Since the mean m of unit vectors u has u·m/|m| = |m| on average, the length of m is the answer.
    """
    return float(torch.linalg.vector_norm(mean_unit_vector))


def correlations_to_mean(unit_BN: Tensor) -> Tensor:
    """(B,) correlation of each of the `unit_vectors` with their mean; their mean is `correlation_to_mean`."""
    mean = unit_BN.mean(0)
    return unit_BN @ (mean / torch.linalg.vector_norm(mean).clamp(min=1e-12))


def centered(theta: Tensor, mean_theta: Tensor) -> Tensor:
    """Transforms with the group's mean transform removed, so that a common zoom or shift does not affect a metric."""
    return compose(theta, invert(mean_theta).expand_as(theta))


def mean_scale(theta: Tensor) -> Tensor:
    """(B,) geometric mean of each transform's two scales; above 1 shrinks the image, below 1 zooms in."""
    return torch.linalg.det(theta[..., :2].float()).abs().sqrt()


def middle_shift(theta: Tensor) -> Tensor:
    """(B,) distance of the center of the common frame from the image's center, as a fraction of the width."""
    return torch.linalg.vector_norm(theta[..., 2].float(), dim=-1) / 2


def parameters(theta: Tensor) -> dict[str, Tensor]:
    """The parts (B,) of transforms (B, 2, 3) as a reader thinks of them.

    rotation_deg: clockwise rotation of the chest in the image. scale: `mean_scale`. stretch: width of the chest
    relative to its height. shift_x_pct and shift_y_pct: how far right of and below the image's center the center of
    the common frame lies, in percent of the width.
    """
    linear = theta[..., :2].float()
    (a, b), (c, d) = linear[..., 0, :].unbind(-1), linear[..., 1, :].unbind(-1)
    x_axis, y_axis = (torch.linalg.vector_norm(linear[..., axis], dim=-1) for axis in (0, 1))
    return {
        "rotation_deg": torch.rad2deg(torch.atan2(c - b, a + d)),
        "scale": mean_scale(theta),
        "stretch": x_axis / y_axis,
        "shift_x_pct": 50 * theta[..., 0, 2].float(),
        "shift_y_pct": 50 * theta[..., 1, 2].float(),
    }


def implausible(theta: Tensor) -> Tensor:
    """(B,) bool: images for which `degenerate` gives a reason."""
    scale = mean_scale(theta)
    return (scale < SCALES[0]) | (scale > SCALES[1]) | ~(middle_shift(theta) <= FARTHEST) | mirrored(theta)


def implausible_reason(theta_23: Tensor) -> str:
    """Why one image's transform is `implausible`, or not finite; or empty."""
    reason = degenerate(*(float(measure(theta_23[None])) for measure in (mean_scale, middle_shift, mirrored)))
    return f"implausible alignment, {reason}" if reason else ""


def mirrored(theta: Tensor) -> Tensor:
    """(B,) bool: left and right are exchanged, or the image has collapsed to a line."""
    return torch.linalg.det(theta[..., :2].float()) <= 0


def degenerate(scale: float, shift: float, mirrored_share: float) -> str:
    """Why a group's transforms are degenerate, from its mean scale, `middle_shift` and share of mirrored images; or
    empty."""
    if not SCALES[0] <= scale <= SCALES[1]:
        return f"collapsed: expected a mean scale from {SCALES[0]} to {SCALES[1]}, got {scale:.2f}"
    if not shift <= FARTHEST:
        return f"drifted: expected a mean shift of at most {FARTHEST:.0%} of the width, got {shift:.0%}"
    if mirrored_share:
        return f"mirrored: {mirrored_share:.0%} of the aligned images have left and right exchanged"
    return ""


def pairwise_iou(masks_BHW: Tensor, of_empty: float = 1.0) -> float:
    """Mean intersection over union of all pairs of different masks (bool); NaN for fewer than two.

    `of_empty` is the value for two empty masks. Needs memory for B² numbers: use a few hundred masks.
    """
    return float(off_diagonal_mean(iou_matrix(masks_BHW, of_empty)))


def iou_matrix(masks_BHW: Tensor, of_empty: float = 1.0) -> Tensor:
    """(B, B) intersection over union of each pair; `of_empty` for two empty masks. Masks in [0, 1] may be soft."""
    flat = masks_BHW.flatten(1).float()
    intersection = flat @ flat.T
    area = flat.sum(1)
    union = area[:, None] + area[None, :] - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1), of_empty)


def off_diagonal_mean(matrix_BB: Tensor) -> Tensor:
    """Mean over all pairs of different rows and columns; NaN for fewer than two."""
    count = len(matrix_BB)
    return (matrix_BB.sum() - matrix_BB.diagonal().sum()) / (count * (count - 1))


def mean_of_others(matrix_BB: Tensor) -> Tensor:
    """(B,) mean over the pairs of each row with the other rows; NaN for fewer than two."""
    return (matrix_BB.sum(1) - matrix_BB.diagonal()) / (len(matrix_BB) - 1)


def resampled_pair_means(matrix_BB: np.ndarray, times_BR: np.ndarray) -> np.ndarray:
    """(R,) mean over pairs in each resample; NaN without pairs.

    Pairs of an image with itself are excluded, also if a resample contains the image more than once.

    Args:
        times_BR: how often each row is sampled.
    """
    matrix, times = np.array(matrix_BB, np.float64), np.asarray(times_BR, np.float64)
    np.fill_diagonal(matrix, 0)
    return ratio(((matrix @ times) * times).sum(0), times.sum(0) ** 2 - (times**2).sum(0))


def pair_interval(
    matrix_BB: np.ndarray, patients_B: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> MeanInterval:
    """The mean over all pairs of different images, such as of `iou_matrix`, with its interval by patient."""
    ids, patients = np.unique(np.asarray(patients_B), return_inverse=True)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        return resampled_pair_means(matrix_BB, times_PR[patients])

    sampled = resample(len(ids), resamples, seed, measure) if len(ids) else np.zeros(0)
    sampled = sampled[np.isfinite(sampled)]
    low, high = np.quantile(sampled, ENDS) if len(sampled) else (math.nan, math.nan)
    value = resampled_pair_means(matrix_BB, np.ones((len(patients), 1)))[0]
    return MeanInterval(float(value), float(low), float(high))


def pose_errors(theta: Tensor, pose: Tensor) -> Tensor:
    """(B,) distance of corners between `in_frame_of` and the known pose, as a fraction of the width."""
    return corner_distance(in_frame_of(theta, pose), pose.double())


def pose_metrics(rows_12: Tensor) -> dict[str, float]:
    """Mean and median of `pose_errors` in percent, and the mean without alignment; empty without rows.

    Args:
        rows_12: (K, 12) predicted and known transforms, each flattened.
    """
    if not len(rows_12):
        return {}
    theta, pose = (rows.reshape(-1, 2, 3) for rows in rows_12.split(6, 1))
    errors = 100 * pose_errors(theta, pose)
    before = 100 * pose_errors(identity(len(pose), pose.device), pose)
    return {
        "corner_error_pct": float(errors.mean()),
        "corner_error_median_pct": float(errors.quantile(0.5)),
        "corner_error_before_pct": float(before.mean()),
    }


def in_frame_of(theta: Tensor, pose: Tensor) -> Tensor:
    """θ∘H (B, 2, 3), float64, where H is the constant frame that brings the transforms closest to the known poses.

    A network is free to choose its common frame, so one H (2, 3) is fitted by least squares over all images and
    corners. H undoes a zoom that is common to all θ.
    """
    theta, pose = theta.double(), pose.double()
    linear, shift = theta[:, :, :2], theta[:, :, 2]
    target = pose - F.pad(shift.unsqueeze(-1), (2, 0))  # θ∘H = [L·H2, L·h + t]
    normal = (linear.transpose(1, 2) @ linear).sum(0)
    frame = torch.linalg.solve(normal, (linear.transpose(1, 2) @ target).sum(0))
    return compose(theta, frame.expand_as(theta))


def local_correlation(a_BCHW: Tensor, b_BCHW: Tensor, side: int) -> Tensor:
    """(B, C, H, W) correlation of two images within squares of `side` (odd) pixels, from −1 to 1."""
    mean_a, mean_b = local_mean(a_BCHW, side), local_mean(b_BCHW, side)
    covariance = local_mean(a_BCHW * b_BCHW, side) - mean_a * mean_b
    variance_a = (local_mean(a_BCHW.square(), side) - mean_a.square()).clamp(min=0)
    variance_b = (local_mean(b_BCHW.square(), side) - mean_b.square()).clamp(min=0)
    return covariance / torch.sqrt((variance_a + 1e-2) * (variance_b + 1e-2))


class Overlap:
    """How well a group's images are aligned; sums over workers.

    Args:
        size: height and width in pixels at which images and masks are compared.
        masks_kept: number of masks of this worker that are compared in pairs, the first ones.
    """

    def __init__(self, size: int, device: torch.device, masks_kept: int = 512) -> None:
        self._unit, self._value, self._square = Mean(), Mean(), Mean()
        self._like = torch.zeros(size * size, device=device)
        self._masks = torch.zeros(0, size, size, dtype=torch.uint8, device=device)
        self._size, self._masks_kept = size, masks_kept

    def add(self, x_B1HW: Tensor, theta: Tensor) -> None:
        """Add images in [0, 1] after the transforms `theta` (B or 1, 2, 3)."""
        both = torch.cat([x_B1HW, normalize_contrast(x_B1HW)], 1)
        aligned, normalized = warp(both, theta, self._size).split(1, 1)
        self._unit.add(unit_vectors(normalized))
        self._value.add(aligned.flatten(1))
        self._square.add(aligned.flatten(1).square())

    def add_masks(self, masks_BHW: Tensor, theta: Tensor) -> None:
        """Add masks, bool or in [0, 1], after the transforms `theta` (B or 1, 2, 3); there may be none."""
        if not len(masks_BHW):
            return
        aligned = warp(masks_BHW[:, None], theta, self._size)[:, 0] > 0.5
        self._masks = torch.cat([self._masks, aligned.to(torch.uint8)])[: self._masks_kept]

    @property
    def full(self) -> bool:
        """Whether further masks would be ignored."""
        return len(self._masks) >= self._masks_kept

    def iou(self, workers: Communicator, of_empty: float = 1.0) -> float:
        """Mean over pairs of masks; NaN for fewer than two."""
        return pairwise_iou(workers.gather(self._masks), of_empty)

    def results(self, workers: Communicator) -> dict[str, float]:
        """The group's correlation, spread and, where there are masks, iou.

        correlation: of each contrast-normalized image with their mean, mean over images. spread: standard
        deviation over images, which lie in [0, 1], mean over pixels.
        """
        value, square = self._value.over(workers, self._like), self._square.over(workers, self._like)
        iou = self.iou(workers)
        results = {
            "correlation": correlation_to_mean(self._unit.over(workers, self._like)),
            "spread": float((square - value.square()).clamp(min=0).sqrt().mean()),
        }
        return results | ({"iou": iou} if not math.isnan(iou) else {})
