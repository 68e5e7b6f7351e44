"""Groupwise alignment with OpenCV's ECC: each image is registered to the mean of all, which is then recomputed.

Evangelidis and Psarakis 2008 (IEEE TPAMI 30(10), 1858–1865) maximize the correlation of an image with a template,
which does not depend on brightness and contrast. The registration is coarse to fine: first rotations and shifts, then
affine transforms, at first from several starting points. These variants, tried one at a time on real X-rays under
random poses, gave less overlap of the lungs: raw, equalized or CLAHE images; much smaller or larger windows; finer or
coarser pictures in the first stage; a single starting point. More rounds, or a window of .4, made no difference.
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
    """Height and width of the pictures in pixels."""
    affine: bool
    """Whether to fit an affine transform (six parameters) or a rotation and shift (three)."""
    iterations: int = 50
    """Maximum number of iterations."""
    blur: int = 5
    """Size in pixels (odd) of the Gaussian window that smooths both pictures."""
    starts: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """Rotations in degrees and scales, relative to the previous result, to start from. The end with the highest
    correlation is used."""


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
    """Settings. The defaults were the best of those tried on real X-rays."""

    rounds: Sequence[Sequence[Stage]] = ROUNDS
    """Stages of each round; the mean image is recomputed after each round."""
    window: float = 0.5
    """Size of the window for local contrast normalization, as a fraction of the width. 0: no normalization."""
    clip: float = 1.0
    """Limit of the contrast in local standard deviations, which suppresses markers and image edges. 0: no limit."""
    epsilon: float = 1e-5
    """Increase in correlation below which a call stops."""


@dataclass(frozen=True)
class Template:
    """What a round registered the images to, and the mean of its transforms, which was then removed."""

    picture: np.ndarray  # (H, W) float32
    mean_theta: Tensor  # (2, 3)


@dataclass(frozen=True)
class Registered:
    """Transforms and the time to compute them."""

    theta: Tensor  # (B, 2, 3), output to input, mean removed
    seconds_per_image: float  # CPU time of one thread, all rounds
    failures: int  # calls that did not converge
    templates: tuple[Template, ...]  # one of each round


def align(images_BHW: np.ndarray, settings: Ecc) -> Registered:
    """Bring uint8 images into one frame. OpenCV uses one thread; limit torch, too, to measure time."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        start = time.thread_time()
        theta, failures, templates = _rounds(_normalized(images_BHW, settings), settings)
        return Registered(theta, (time.thread_time() - start) / len(images_BHW), failures, tuple(templates))
    finally:
        cv2.setNumThreads(threads)


def align_one(image_HW: np.ndarray, templates: Sequence[Template], settings: Ecc) -> Tensor:
    """The transform (2, 3) of another uint8 image into the frame of the images that `align` made `templates` of."""
    image = _normalized(image_HW[None], settings)[0, 0].numpy()
    theta = identity()
    for stages, template in zip(settings.rounds, templates, strict=True):
        refined, _ = register(image, template.picture, theta[0], stages, settings.epsilon)
        theta = centered(refined[None], template.mean_theta[None])
    return theta[0]


def _rounds(x_B1HW: Tensor, settings: Ecc) -> tuple[Tensor, int, list[Template]]:
    theta, failures, templates = identity(len(x_B1HW)), 0, list[Template]()
    for stages in settings.rounds:
        template = warp(x_B1HW, theta).mean(0)[0].numpy()
        refined = theta.clone()
        for i, image in enumerate(x_B1HW[:, 0].numpy()):
            refined[i], failed = register(image, template, theta[i], stages, settings.epsilon)
            failures += failed
        mean_theta = refined.mean(0)
        templates.append(Template(template, mean_theta))
        theta = centered(refined, mean_theta[None])
    return theta, failures, templates


def register(
    image: np.ndarray, template: np.ndarray, theta: Tensor, stages: Sequence[Stage], epsilon: float
) -> tuple[Tensor, int]:
    """`theta` (2, 3) after all stages, and the number of failures. A stage that fails leaves `theta` unchanged."""
    failed = 0
    for stage in stages:
        refined = _stage(image, template, theta, stage, epsilon)
        failed += refined is None
        theta = theta if refined is None else refined
    return theta, failed


def _stage(image: np.ndarray, template: np.ndarray, theta: Tensor, stage: Stage, epsilon: float) -> Tensor | None:
    """A refined `theta`; None if ECC did not converge to a plausible transform from any starting point."""
    side = (stage.size, stage.size)
    image, template = (cv2.resize(picture, side, interpolation=cv2.INTER_AREA) for picture in (image, template))
    best, best_correlation = None, -1.0
    for turn, scale in stage.starts:
        transform = _ecc(image, template, compose(theta, _similarity(turn, scale)), stage, epsilon)
        if transform is None:
            continue
        correlation = _correlation(image, template, transform)
        if correlation > best_correlation:
            best, best_correlation = to_unit(transform, stage.size), correlation
    return best


def _ecc(image: np.ndarray, template: np.ndarray, theta: Tensor, stage: Stage, epsilon: float) -> np.ndarray | None:
    """One call of ECC, starting from `theta`: a transform of pixels, or None if it did not converge or has an
    implausible scale."""
    motion = cv2.MOTION_AFFINE if stage.affine else cv2.MOTION_EUCLIDEAN
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, stage.iterations, epsilon)
    first = to_pixels(theta, stage.size)
    try:
        _, transform = cv2.findTransformECC(template, image, first, motion, stop, None, stage.blur)  # pyright: ignore
    except cv2.error:
        return None
    scale = np.sqrt(abs(np.linalg.det(transform[:, :2].astype(np.float64))))
    return transform if np.isfinite(transform).all() and SCALES[0] <= scale <= SCALES[1] else None


def _correlation(image: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> float:
    """Correlation over the whole picture. ECC's own value covers only the overlap, which would reward zooming in."""
    shown = cv2.warpAffine(image, pixels, template.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return float(np.corrcoef(shown.ravel(), template.ravel())[0, 1])


def _similarity(turn_deg: float, scale: float) -> Tensor:
    cos, sin = scale * math.cos(math.radians(turn_deg)), scale * math.sin(math.radians(turn_deg))
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0]])


def to_pixels(theta: Tensor, size: int) -> np.ndarray:
    """`theta_unit` (2, 3) as a float32 transform of pixel indices, as OpenCV's warps expect it."""
    linear, shift = theta[:, :2].double().numpy(), theta[:, 2].double().numpy()
    first = 1 / size - 1  # position of the center of pixel 0 on an axis from −1 to 1
    moved = (linear @ np.full(2, first) + shift - first) * size / 2
    return np.column_stack([linear, moved]).astype(np.float32)


def to_unit(pixels: np.ndarray, size: int) -> Tensor:
    """The inverse of `to_pixels`."""
    linear, moved = pixels[:, :2].astype(np.float64), pixels[:, 2].astype(np.float64)
    first = 1 / size - 1
    shift = moved * 2 / size + first - linear @ np.full(2, first)
    return torch.from_numpy(np.column_stack([linear, shift])).float()


def _normalized(images_BHW: np.ndarray, settings: Ecc) -> Tensor:
    """float32 (B, 1, H, W)."""
    x = torch.from_numpy(images_BHW)[:, None].float() / 255
    x = normalize_contrast(x, settings.window) if settings.window else x
    return x.clamp(-settings.clip, settings.clip) if settings.clip else x
