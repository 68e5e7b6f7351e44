"""Render a phantom image from anatomy, findings, pose and film, with its ground truth."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxr.phantom.anatomy import Anatomy
from cxr.phantom.canvas import IDENTITY, Canvas, Mask
from cxr.phantom.chest import healthy
from cxr.phantom.film import Film
from cxr.phantom.findings import DRAW, check_findings, reshape
from cxr.schema import FINDINGS, LUNGS

_MIN_PX = 9  # instances with fewer visible pixels are ignored


@dataclass(frozen=True)
class Box:
    """The box of a finding, in pixels of the image with edges at integers (pixel i covers [i, i + 1])."""

    label: str
    xyxy_px: tuple[int, int, int, int]


@dataclass(frozen=True)
class Phantom:
    """A rendered chest and its ground truth.

    Attributes:
        pixels: (size, size) uint8, dense tissue bright.
        labels: visible findings, in the order of `schema.FINDINGS`.
        boxes: one per instance, the exact bounding box of its mask.
        masks: (size, size) bool by label: `schema.LUNGS` (both visible lung fields, including diseased parts)
            and each finding (all its instances).
        pose_unit: (2, 3), canonical to image in `affine_grid` coordinates: `grid_sample` of this image at
            `affine_grid(pose_unit)` shows the chest in neutral pose.
    """

    pixels: NDArray[np.uint8]
    labels: tuple[str, ...]
    boxes: tuple[Box, ...]
    masks: dict[str, Mask]
    pose_unit: NDArray[np.float64]


def render(
    anatomy: Anatomy,
    findings: Collection[str],
    rng: np.random.Generator,
    *,
    size: int = 512,
    pose_unit: ArrayLike = IDENTITY,
    film: Film | None = None,
) -> Phantom:
    """Render a patient with `findings` in a pose. Deterministic: the same arguments and `rng` state give the same
    image.

    Raises:
        UserError: a finding is not in `schema.FINDINGS`.
    """
    check_findings(findings)
    film = film or Film()
    anatomy = reshape(anatomy, findings, rng)
    canvas = Canvas(size, pose_unit)
    scene = healthy(canvas, anatomy, rng)
    open_field = film.open_field(size)
    instances = {label: _visible(draw(scene, rng), open_field) for label, draw in DRAW.items() if label in findings}
    masks = {LUNGS: (scene.lungs[-1] | scene.lungs[1]) & open_field}
    masks |= {label: np.logical_or.reduce(instances[label]) for label in FINDINGS if instances.get(label)}
    return Phantom(
        pixels=film.develop(scene.thickness(), rng),
        labels=tuple(label for label in masks if label != LUNGS),
        boxes=tuple(Box(label, enclosing_box(mask)) for label in masks for mask in instances.get(label, [])),
        masks=masks,
        pose_unit=canvas.pose_unit,
    )


def _visible(instances: list[Mask], open_field: Mask) -> list[Mask]:
    visible = [mask & open_field for mask in instances]
    return [mask for mask in visible if mask.sum() >= _MIN_PX]


def enclosing_box(mask: Mask) -> tuple[int, int, int, int]:
    """The bounding box x_min, y_min, x_max, y_max of a non-empty mask; edges at integers."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def sample_pose(rng: np.random.Generator, strength: float = 1.0) -> NDArray[np.float64]:
    """A random `pose_unit`: rotation up to 12°, scale ±15 %, stretch and shear up to 5 %, shift up to 0.12.

    `strength` scales all of these; 0 gives the identity.
    """
    angle, shear = strength * np.radians(5.0) * _bounded(rng), strength * 0.02 * _bounded(rng)
    scale, aspect = np.exp(strength * (0.06 * _bounded(rng) - 0.03)), np.exp(strength * 0.02 * _bounded(rng))
    shift = strength * 0.05 * np.array([_bounded(rng), _bounded(rng)])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([[scale * aspect, shear], [0.0, scale / aspect]])
    return np.column_stack([rotation @ stretch, shift])


def _bounded(rng: np.random.Generator) -> float:
    return float(np.clip(rng.normal(), -2.4, 2.4))
