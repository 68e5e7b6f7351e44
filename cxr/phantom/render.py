"""One phantom image: anatomy, findings, pose and film put together, with the truth that goes with it."""

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

_LEAST_PX = 9  # an instance that shows fewer pixels is none


@dataclass(frozen=True)
class Box:
    """A finding's place; original pixels, edges at integers (pixel i covers [i, i + 1])."""

    label: str
    xyxy_px: tuple[int, int, int, int]


@dataclass(frozen=True)
class Phantom:
    """A rendered chest and what is known about it.

    Attributes:
        pixels: (size, size) uint8, dense tissue bright.
        labels: findings that show, in `schema.FINDINGS`' order.
        boxes: one an instance, enclosing its mask exactly.
        masks: by label, (size, size) bool: `schema.LUNGS` (both visible lung fields, diseased parts included)
            and each finding, all its instances together.
        pose_unit: (2, 3), canonical to image in `affine_grid` coordinates: `grid_sample` of this image at
            `affine_grid(pose_unit)` shows the chest unmoved.
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
    """Draw a patient with `findings` in a pose. Pure: the same arguments and `rng` state give the same image.

    Raises:
        UserError: a finding that is none of `schema.FINDINGS`.
    """
    check_findings(findings)
    film = film or Film()
    anatomy = reshape(anatomy, findings, rng)
    canvas = Canvas(size, pose_unit)
    scene = healthy(canvas, anatomy, rng)
    shown = film.open_field(size)
    instances = {label: _visible(draw(scene, rng), shown) for label, draw in DRAW.items() if label in findings}
    masks = {LUNGS: (scene.lungs[-1] | scene.lungs[1]) & shown}
    masks |= {label: np.logical_or.reduce(instances[label]) for label in FINDINGS if instances.get(label)}
    return Phantom(
        pixels=film.develop(scene.thickness(), rng),
        labels=tuple(label for label in masks if label != LUNGS),
        boxes=tuple(Box(label, enclosing_box(mask)) for label in masks for mask in instances.get(label, [])),
        masks=masks,
        pose_unit=canvas.pose_unit,
    )


def _visible(instances: list[Mask], shown: Mask) -> list[Mask]:
    visible = [mask & shown for mask in instances]
    return [mask for mask in visible if mask.sum() >= _LEAST_PX]


def enclosing_box(mask: Mask) -> tuple[int, int, int, int]:
    """The smallest x_min, y_min, x_max, y_max around a mask that is not empty; edges at integers."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def sample_pose(rng: np.random.Generator, strength: float = 1.0) -> NDArray[np.float64]:
    """A random `pose_unit`: up to 12° of turn, ±15 % of size, 5 % of stretch and shear, 0.12 of shift.

    `strength` scales all of it; 0 is the identity.
    """
    turn, shear = strength * np.radians(5.0) * _bounded(rng), strength * 0.02 * _bounded(rng)
    scale, uneven = np.exp(strength * (0.06 * _bounded(rng) - 0.03)), np.exp(strength * 0.02 * _bounded(rng))
    shift = strength * 0.05 * np.array([_bounded(rng), _bounded(rng)])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    stretch = np.array([[scale * uneven, shear], [0.0, scale / uneven]])
    return np.column_stack([rotation @ stretch, shift])


def _bounded(rng: np.random.Generator) -> float:
    return float(np.clip(rng.normal(), -2.4, 2.4))
