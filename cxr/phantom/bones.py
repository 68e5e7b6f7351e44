"""Ribs, clavicles, shoulder blades, upper arms and spine, in centimeters of soft tissue."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cxr.phantom.anatomy import SIDES, Anatomy
from cxr.phantom.canvas import Canvas, Layer, Points, disc

_VERTEBRA = np.array([(-1, -1), (0, -0.88), (1, -1), (0.88, 0), (1, 1), (0, 0.88), (-1, 1), (-0.88, 0)])
_ROUND = disc((0, 0), 1, points=20)


def draw_bones(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> Layer:
    """All bones of a patient."""
    arcs = [anatomy.ribs(side) for side in SIDES]
    ribs = 1.7 * _tubes(canvas, [line for posterior, _ in arcs for line in posterior], anatomy.rib_width)
    ribs += 1.0 * _tubes(canvas, [line for _, anterior in arcs for line in anterior], 1.12 * anatomy.rib_width)
    ribs *= 1 - 0.65 * np.clip((canvas.y - anatomy.dome) * 4, 0, 1)  # obscured by scatter below the lungs
    bones = ribs + _spine(canvas, anatomy)
    shoulders = [bone(side) for side in SIDES for bone in (anatomy.clavicle, anatomy.humerus)]
    bones += 2.4 * _rounded(canvas, shoulders, 0.025)
    bones += 0.8 * canvas.blur(canvas.fill(anatomy.scapula(side) for side in SIDES), 0.004)
    bones *= 1 + 0.10 * canvas.texture(rng, 0.016)
    return bones * np.float32(anatomy.bone)


def _tubes(canvas: Canvas, lines: list[Points], half_width: float) -> Layer:
    """Hollow bones seen from the side: dense rims and a less dense marrow space."""
    layer = np.zeros((canvas.size, canvas.size), np.uint8)
    canvas.trace_on(layer, lines, 2 * half_width, 1.0)
    canvas.trace_on(layer, lines, 1.25 * half_width, 0.62)
    return canvas.blur(layer.astype(np.float32) * np.float32(1.6 / 255), 0.0045)


def _rounded(canvas: Canvas, outlines: Iterable[Points], radius: float) -> Layer:
    shape = canvas.fill(outlines)
    return canvas.blur(0.45 * shape + 0.55 * canvas.solid(shape, radius), 0.003)


def _spine(canvas: Canvas, anatomy: Anatomy) -> Layer:
    """Vertebral bodies with end plates, pedicles, spinous and transverse processes."""
    vertebrae = anatomy.vertebrae()[:, None]  # (N, 1, 4)
    center, half = vertebrae[..., :2], vertebrae[..., 2:]
    bodies = center + half * _VERTEBRA
    plates = np.concatenate([bodies[:, :3], bodies[:, 4:7]])
    pedicles = [center + half * (side * 0.62, -0.25) + (0.013, 0.018) * _ROUND for side in SIDES]
    spinous = center + half * (0, 0.75) + (0.011, 0.030) * _ROUND
    transverse = center + half * (0, -0.3) + half * (1.6, 0.26) * _ROUND
    spine = 1.5 * canvas.fill(bodies) + 0.7 * canvas.trace(plates, 0.010)
    spine += 0.9 * canvas.fill(np.concatenate([*pedicles, spinous])) + 0.7 * canvas.fill(transverse)
    return canvas.blur(spine, 0.007)
