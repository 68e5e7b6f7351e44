"""Groupwise alignment by OpenCV's ECC: each image is registered to the mean of all, which is then taken anew.

Evangelidis and Psarakis 2008 (IEEE TPAMI 30(10), 1858–1865) maximize the correlation of an image with a template,
which brightness and contrast do not change. From coarse to fine: first turned and shifted, then any affine, at
first from several starts. Tried one at a time on real X-rays under random poses and left out, since lungs overlapped
less: images as they are, equalized, or with CLAHE; much smaller or larger windows; finer or still coarser pictures at
first; one start. More rounds, or a window of .4, changed next to nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from cxr.metrics.alignment import centered
from cxr.models.backbones import normalize_contrast
from cxr.models.spatial_transformer import compose, identity, warp

SCALES = (0.6, 1.6)  # mean scales outside of which a registration has failed


@dataclass(frozen=True)
class Stage:
    """One call of ECC."""

    size: int
    """Height and width, pixels."""
    affine: bool
    """Six parameters; otherwise three: shift and rotation."""
    iterations: int = 50
    """Maximum number of iterations."""
    blur: int = 5
    """Side of the Gaussian window by which both pictures are smoothed, pixels, odd."""
    starts: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """Turns in degrees, and scales, from which to start besides what is known; the best correlated end counts."""


NEARBY = tuple((turn, scale) for scale in (0.85, 1.0, 1.18) for turn in (-12.0, 0.0, 12.0))
ROUNDS = (
    (Stage(24, False),),
    (Stage(24, True, starts=NEARBY),),
    (Stage(24, True, starts=NEARBY),),
    (Stage(24, True, starts=NEARBY),),
    (Stage(32, True),),
    (Stage(64, True, blur=9),),
)


@dataclass(frozen=True)
class Ecc:
    """Settings; of those tried on real X-rays, the defaults were best."""

    rounds: Sequence[Sequence[Stage]] = ROUNDS
    """Stages a round; after each round the mean is taken again."""
    window: float = 0.5
    """Side of the square in which contrast is normalized, share of the width; 0 for the image as it is."""
    clip: float = 1.0
    """Largest contrast, in local deviations: beyond it lie markers and the edges of the picture; 0 for no limit."""
    epsilon: float = 1e-5
    """Gain in correlation below which a call stops."""


@dataclass(frozen=True)
class Registered:
    """Transforms, and the time they took."""

    theta: Tensor  # (B, 2, 3), output to input, their mean removed
    seconds_per_image: float  # of one thread of the processor, all rounds together
    failures: int  # calls that did not converge


def align(images_BHW: np.ndarray, settings: Ecc) -> Registered:
    """Bring uint8 images into one frame. OpenCV uses one thread, as many as the caller's torch should."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        start = time.thread_time()
        theta, failures = _rounds(_prepared(images_BHW, settings), settings)
        return Registered(theta, (time.thread_time() - start) / len(images_BHW), failures)
    finally:
        cv2.setNumThreads(threads)


def _rounds(x_B1HW: Tensor, settings: Ecc) -> tuple[Tensor, int]:
    theta, failures = identity(len(x_B1HW)), 0
    for stages in settings.rounds:
        template = warp(x_B1HW, theta).mean(0)[0].numpy()
        found = theta.clone()
        for i, image in enumerate(x_B1HW[:, 0].numpy()):
            found[i], failed = register(image, template, theta[i], stages, settings.epsilon)
            failures += failed
        theta = centered(found, found.mean(0, keepdim=True))
    return theta, failures


def register(
    image: np.ndarray, template: np.ndarray, theta: Tensor, stages: Sequence[Stage], epsilon: float
) -> tuple[Tensor, int]:
    """`theta` (2, 3) after all stages, and how many failed; a stage that fails leaves what was there before."""
    failed = 0
    for stage in stages:
        found = _stage(image, template, theta, stage, epsilon)
        failed += found is None
        theta = theta if found is None else found
    return theta, failed


def _stage(image: np.ndarray, template: np.ndarray, theta: Tensor, stage: Stage, epsilon: float) -> Tensor | None:
    """A finer `theta`, None if ECC converged from no start or went astray."""
    side = (stage.size, stage.size)
    small, wanted = (cv2.resize(picture, side, interpolation=cv2.INTER_AREA) for picture in (image, template))
    best, best_correlation = None, -1.0
    for turn, scale in stage.starts:
        found = _ecc(small, wanted, compose(theta, _similarity(turn, scale)), stage, epsilon)
        if found is None:
            continue
        correlation = _correlation(small, wanted, found)
        if correlation > best_correlation:
            best, best_correlation = to_unit(found, stage.size), correlation
    return best


def _ecc(small: np.ndarray, wanted: np.ndarray, theta: Tensor, stage: Stage, epsilon: float) -> np.ndarray | None:
    """One call from `theta`; the map of pixels, None if it did not converge or changed the scale too much."""
    motion = cv2.MOTION_AFFINE if stage.affine else cv2.MOTION_EUCLIDEAN
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, stage.iterations, epsilon)
    first = to_pixels(theta, stage.size)
    try:
        _, found = cv2.findTransformECC(wanted, small, first, motion, stop, None, stage.blur)  # pyright: ignore
    except cv2.error:
        return None
    scale = np.sqrt(abs(np.linalg.det(found[:, :2].astype(np.float64))))
    return found if np.isfinite(found).all() and SCALES[0] <= scale <= SCALES[1] else None


def _correlation(small: np.ndarray, wanted: np.ndarray, pixels: np.ndarray) -> float:
    """Over the whole picture, where ECC's own counts only what both show: else zooming in would pay."""
    shown = cv2.warpAffine(small, pixels, wanted.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return float(np.corrcoef(shown.ravel(), wanted.ravel())[0, 1])


def _similarity(turn_deg: float, scale: float) -> Tensor:
    cos, sin = scale * math.cos(math.radians(turn_deg)), scale * math.sin(math.radians(turn_deg))
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0]])


def to_pixels(theta: Tensor, size: int) -> np.ndarray:
    """`theta_unit` (2, 3) as a float32 map of pixels' indices, with which OpenCV's warps take it."""
    linear, shift = theta[:, :2].double().numpy(), theta[:, 2].double().numpy()
    first = 1 / size - 1  # of the center of pixel 0, on an axis from −1 to 1
    moved = (linear @ np.full(2, first) + shift - first) * size / 2
    return np.column_stack([linear, moved]).astype(np.float32)


def to_unit(pixels: np.ndarray, size: int) -> Tensor:
    """What `to_pixels` undoes."""
    linear, moved = pixels[:, :2].astype(np.float64), pixels[:, 2].astype(np.float64)
    first = 1 / size - 1
    shift = moved * 2 / size + first - linear @ np.full(2, first)
    return torch.from_numpy(np.column_stack([linear, shift])).float()


def _prepared(images_BHW: np.ndarray, settings: Ecc) -> Tensor:
    """float32 (B, 1, H, W)."""
    x = torch.from_numpy(images_BHW)[:, None].float() / 255
    x = normalize_contrast(x, settings.window) if settings.window else x
    return x.clamp(-settings.clip, settings.clip) if settings.clip else x
