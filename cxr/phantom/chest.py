"""The healthy chest: soft tissue, airways, lungs, heart, bones and vessels."""

from __future__ import annotations

import cv2
import numpy as np

from cxr.phantom.anatomy import SIDES, Anatomy
from cxr.phantom.bones import draw_bones
from cxr.phantom.canvas import Canvas, Layer, Mask, disc, rounded
from cxr.phantom.scene import LUNG_CM, TRUNK_CM, Scene
from cxr.phantom.vessels import draw_vessels


def healthy(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> Scene:
    """A chest without findings."""
    fields = {side: canvas.inside(anatomy.lung(side)) for side in SIDES}
    heart = canvas.inside(anatomy.heart())
    vascular = canvas.fill([anatomy.mediastinum()])
    covered = heart | (vascular >= 0.5)
    lungs = {side: _main_part(canvas, anatomy, side, field & ~covered) for side, field in fields.items()}
    air = _air(canvas, anatomy, fields[-1] | fields[1], heart, vascular)
    return Scene(
        canvas=canvas,
        anatomy=anatomy,
        tissue=_soft_tissue(canvas, anatomy, rng) + draw_bones(canvas, anatomy, rng),
        air=air,
        markings=draw_vessels(canvas, anatomy, rng) * air * np.float32(1 / LUNG_CM),
        filled=np.zeros_like(air),
        lungs=lungs,
        aerated={side: lung.copy() for side, lung in lungs.items()},
        behind={side: fields[side] & ~lungs[side] for side in SIDES},
        heart=heart,
    )


def _main_part(canvas: Canvas, anatomy: Anatomy, side: int, lung: Mask) -> Mask:
    """The part of a lung field that is connected to the upper outer lung, without slivers cut off by the heart."""
    row, column = canvas.px_at((side * 0.62 * anatomy.width, -0.35))
    parts = lung.astype(np.uint8)
    if parts[row, column]:
        cv2.floodFill(parts, None, (column, row), (2,))
    return parts == parts[row, column] if parts[row, column] else lung


def _air(canvas: Canvas, anatomy: Anatomy, both: Mask, heart: Mask, vascular: Layer) -> Layer:
    """Air thickness: increases inwards from the chest wall; heart and vessels displace most of it."""
    depth = canvas.depth(both)
    air = 0.30 * rounded(depth, 0.05) + 0.70 * canvas.blur(rounded(depth, 0.30), 0.012)
    air += _behind_the_dome(canvas, anatomy) * ~both
    depth = canvas.depth(heart)
    air *= 1 - 0.74 * canvas.blur(0.5 * rounded(depth, 0.07) + 0.5 * rounded(depth, 0.25), 0.004)
    air *= 1 - 0.90 * canvas.blur(vascular, 0.009)
    air *= 1 - 0.25 * canvas.fill([anatomy.aorta()])
    return air * np.float32(LUNG_CM)


def _behind_the_dome(canvas: Canvas, anatomy: Anatomy) -> Layer:
    """A faint shade below the line of the diaphragm, because the lungs extend further down behind the liver."""
    coarse, wall = canvas.coarser, anatomy.width
    right, left = (
        coarse.bump((side * 0.5 * wall, anatomy.dome_y(side) + 0.08), (0.42 * wall, 0.16), 2.0) for side in SIDES
    )
    return canvas.enlarged(0.13 * (right + left))


def _soft_tissue(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> Layer:
    """Trunk, neck, arms, breasts; drawn at low resolution, because only the skin has a sharp edge."""
    coarse = canvas.coarser
    depth = coarse.depth(coarse.inside(anatomy.body()))
    tissue = 0.35 * rounded(depth, 0.16) + 0.65 * coarse.blur(rounded(depth, 0.5), 0.04)
    tissue *= TRUNK_CM * np.clip(1.0 + 0.22 * (coarse.y - 0.1), 0.8, 1.25)  # the belly is thicker
    tissue += anatomy.fat * 14 * coarse.blur(rounded(depth, 0.05), 0.01)
    if anatomy.breast:
        right, left = (coarse.solid(coarse.inside(outline), 0.25) for outline in anatomy.breasts())
        tissue += 2.6 * anatomy.breast * coarse.blur(right + left, 0.012)
    tissue *= 1 - 0.20 * coarse.blur(_airway(coarse, anatomy), 0.008)
    tissue -= _stomach_gas(coarse, anatomy, rng)
    uneven = 0.5 * coarse.texture(rng, 0.35) + 0.25 * coarse.texture(rng, 0.09)
    return canvas.enlarged((tissue + uneven * np.minimum(tissue * 0.1, 1)).astype(np.float32))


def _airway(canvas: Canvas, anatomy: Anatomy) -> Layer:
    """Trachea and main bronchi, 1 inside."""
    y = np.linspace(-1.1, -0.30, 12)
    trachea = np.column_stack([anatomy.spine_x(y) - 0.01, y])
    bronchi = trachea[-1] + np.array([[(0, 0), (-0.13, 0.13)], [(0, 0), (0.16, 0.12)]])
    return np.maximum(canvas.trace([trachea], 0.062), 0.6 * canvas.trace(bronchi, 0.045))


def _stomach_gas(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> Layer:
    """The stomach bubble below the left dome; absent in half of the images."""
    center = (rng.uniform(0.26, 0.44), anatomy.dome_y(1) + rng.uniform(0.13, 0.18))
    bubble = disc(center, (rng.uniform(0.07, 0.16), rng.uniform(0.045, 0.08)), rng.normal(0, 0.06, (2, 2)))
    thickness = max(0.0, rng.uniform(-5, 5))
    return np.float32(thickness) * canvas.blur(canvas.solid(canvas.inside(bubble), 0.05), 0.012)
