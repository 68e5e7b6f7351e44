"""Pulmonary arteries and veins: random trees that branch from the hila."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxr.phantom.anatomy import SIDES, Anatomy
from cxr.phantom.canvas import Canvas, Layer, Points

_STEMS, _GENERATIONS = 9, 9
_WIDEST = 0.019


def draw_vessels(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> Layer:
    """Lung markings in cm; two trees per lung, so that crossings add up."""
    vessels = np.zeros((canvas.size, canvas.size), np.float32)
    for _ in range(2):
        vessels += _draw_trees(canvas, anatomy, rng)
    coarse = canvas.coarser
    right, left = (coarse.bump(anatomy.hilum(side), (0.075, 0.13)) for side in SIDES)
    grain = 0.12 * canvas.texture(rng, 0.030) + 0.10 * canvas.texture(rng, 0.014)
    return canvas.blur(vessels * np.float32(4.2 / 255), 0.0022) + canvas.enlarged(1.6 * (right + left)) + grain


def _draw_trees(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One tree per lung; thin branches are drawn first, so that thick ones cover them."""
    layer = np.zeros((canvas.size, canvas.size), np.uint8)
    for segments, width in reversed(_grow(anatomy, rng)):
        canvas.trace_on(layer, segments, width, min(1.0, width / _WIDEST))
    return layer


def _grow(anatomy: Anatomy, rng: np.random.Generator) -> list[tuple[Points, float]]:
    """Generations of segments (N, 2, 2) with their mean width; each generation is thinner and more numerous."""
    # Angles relative to the lateral direction, positive downwards: vessels that go down are more and wider.
    side = np.repeat(SIDES, _STEMS)
    angle = np.tile(np.linspace(-1.35, 1.45, _STEMS), 2) + rng.normal(0, 0.10, len(side))
    start = np.repeat([anatomy.hilum(s) for s in SIDES], _STEMS, axis=0) + rng.normal(0, 0.02, (len(side), 2))
    start[:, 1] += 0.09 * np.sin(angle)
    width = rng.uniform(0.009, 0.016, len(side)) * np.where(angle > 0, 1.15, 0.85)
    generations: list[tuple[Points, float]] = []
    for _ in range(_GENERATIONS):
        length = rng.uniform(0.05, 0.095, len(side))[:, None]
        end = start + length * np.column_stack([side * np.cos(angle), np.sin(angle)])
        generations.append((np.stack([start, end], 1), float(width.mean())))
        split = rng.random(len(side)) < 0.52
        turn = rng.normal(0, 0.13, len(side)) - split * rng.uniform(0.1, 0.4, len(side))
        branch = angle[split] + rng.uniform(0.2, 0.65, int(split.sum()))
        start, angle = np.vstack([end, end[split]]), np.concatenate([angle + turn, branch])
        side, width = np.concatenate([side, side[split]]), np.concatenate([width * 0.80, width[split] * 0.62])
    return generations
