"""Phantoms that are not frontal chest X-rays: lateral chests, abdomens, limbs and heads.

They serve to train and test the gate (`cxr.data.gate`), are much coarser than the frontal phantoms, and have no
ground truth. Canonical coordinates as in `canvas`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cxr.phantom.canvas import Canvas, Layer, Points, closed_curve, disc, open_curve, rounded, strip
from cxr.phantom.film import Film
from cxr.phantom.render import sample_pose

LATERAL, ABDOMEN, LIMB, HEAD = "lateral chest", "abdomen", "limb", "head"
KINDS = (LATERAL, ABDOMEN, LIMB, HEAD)


def render_other(kind: str, rng: np.random.Generator, size: int = 256) -> NDArray[np.uint8]:
    """An image (size, size) of one of `KINDS` in a random pose and exposure, dense tissue bright."""
    canvas = Canvas(size, sample_pose(rng))
    film = Film.sample(rng, "AP" if rng.random() < 0.3 else "PA")
    if kind in (LIMB, HEAD):  # thinner than a trunk
        film = replace(film, middle=rng.uniform(3, 7), latitude=rng.uniform(1.5, 3.5))
    tissue = {LATERAL: _lateral, ABDOMEN: _abdomen, LIMB: _limb, HEAD: _head}[kind](canvas, rng)
    tissue = tissue + 0.3 * canvas.texture(rng, 0.2) * np.minimum(0.1 * tissue, 1)
    return film.develop(np.maximum(tissue, 0).astype(np.float32), rng)


def _solid(canvas: Canvas, outline: Points, radius: float) -> Layer:
    """A rounded body: 1 in its middle, 0 at its edge."""
    return canvas.solid(canvas.inside(outline), radius)


def _lateral(canvas: Canvas, rng: np.random.Generator) -> Layer:
    """A chest from the side, facing left or right: spine behind, sternum in front, two domes, raised arms."""
    front = rng.choice((-1.0, 1.0))
    deep = rng.normal(0.62, 0.05)  # half of the chest's depth
    dome = rng.normal(0.42, 0.06)

    def at(points: list[tuple[float, float]]) -> Points:
        """Points with x from the back (−1) to the front (1), in canonical coordinates."""
        return np.array([(front * deep * x, y) for x, y in points])

    trunk = closed_curve(
        at(
            [
                (-1.25, -0.7),
                (-0.6, -1.15),
                (0.7, -1.15),
                (1.0, -0.65),
                (1.3, 0.1),
                (1.25, 1.2),
                (-1.3, 1.2),
                (-1.4, 0.1),
            ]
        )
    )
    depth = canvas.depth(canvas.inside(trunk))
    tissue = 26 * (0.5 * rounded(depth, 0.2) + 0.5 * rounded(depth, 0.7))
    arm = strip(open_curve(at([(0.1, -0.62), (0.6, -0.95), (1.2, -1.25)])), 0.17)
    tissue += 7 * _solid(canvas, arm, 0.15)
    lung = closed_curve(
        at(
            [
                (-0.2, -0.78), (0.3, -0.68), (0.72, -0.35), (0.86, 0.05), (0.88, dome),
                (0.35, dome - 0.16), (-0.35, dome), (-0.95, dome + 0.38), (-0.98, -0.1), (-0.7, -0.6),
            ]
        )
    )  # fmt: skip
    air = canvas.blur(_solid(canvas, lung, 0.3), 0.01)
    heart = disc(at([(0.35, dome - 0.3)])[0], (0.36 * deep / 0.62, 0.27), rng.normal(0, 0.03, (2, 2)))
    air *= 1 - 0.6 * canvas.blur(_solid(canvas, heart, 0.15), 0.01)
    arch = open_curve(at([(0.2, dome - 0.5), (0.05, -0.42), (-0.35, -0.4), (-0.62, -0.1), (-0.68, dome)]))
    air *= 1 - 0.3 * canvas.blur(canvas.trace([arch], 0.14), 0.015)
    tissue -= 19 * air
    tissue -= 2.5 * canvas.blur(canvas.trace([at([(-0.12, -1.1), (-0.18, -0.35)])], 0.08), 0.01)  # trachea
    line = open_curve(at([(-0.62, -1.1), (-0.78, -0.5), (-0.95, 0.0), (-0.9, 0.5), (-0.72, 1.15)]), 24)
    tissue += _vertebrae(canvas, line, count=14, half_width=0.085)
    tissue += 3 * canvas.blur(canvas.trace([open_curve(at([(0.72, -0.55), (0.95, -0.1), (0.98, 0.2)]))], 0.05), 0.006)
    ribs = [open_curve(at([(-0.85, y), (-0.2, y + 0.22), (0.75, y + 0.25)])) for y in np.arange(-0.75, 0.45, 0.15)]
    return tissue + 1.2 * canvas.blur(canvas.trace(ribs, 0.035), 0.004)


def _abdomen(canvas: Canvas, rng: np.random.Generator) -> Layer:
    """An abdomen from the front: lumbar spine, pelvis, bowel gas; at most the bases of the lungs at the top."""
    wide = rng.normal(0.85, 0.06)
    trunk = closed_curve(
        np.array([(-wide, -1.3), (wide, -1.3), (wide, 0.3), (1.05 * wide, 1.3), (-1.05 * wide, 1.3), (-wide, 0.3)])
    )
    depth = canvas.depth(canvas.inside(trunk))
    tissue = 23 * (0.5 * rounded(depth, 0.2) + 0.5 * rounded(depth, 0.8))
    tissue += _vertebrae(canvas, np.array([(rng.normal(0, 0.02), y) for y in np.linspace(-1.2, 0.55, 40)]), 8, 0.12)
    for side in (-1, 1):
        wing = closed_curve(
            np.array(
                [
                    (side * 0.12, 0.6),
                    (side * 0.3, 0.3),
                    (side * 0.68, 0.2),
                    (side * 0.74, 0.45),
                    (side * 0.42, 0.82),
                    (side * 0.14, 0.85),
                ]
            )
        )
        tissue += 3.5 * canvas.blur(_solid(canvas, wing, 0.08), 0.01)
        hip = disc((side * 0.55, 0.98), 0.13)
        tissue += 4 * canvas.blur(_solid(canvas, hip, 0.06), 0.008)
        ribs = [
            open_curve(np.array([(side * 0.1, y), (side * 0.5, y + 0.1), (side * 0.75, y + 0.3)]))
            for y in (-1.0, -0.85, -0.7)
        ]
        tissue += 1.2 * canvas.blur(canvas.trace(ribs, 0.045), 0.005)
    for _ in range(rng.integers(5, 22)):  # bowel gas
        center = rng.uniform((-0.65, -0.6), (0.65, 0.6))
        bubble = disc(center, rng.uniform(0.03, 0.13, 2), rng.normal(0, 0.12, (3, 2)))
        tissue -= rng.uniform(2, 8) * canvas.blur(_solid(canvas, bubble, 0.08), 0.01)
    if rng.random() < 0.5:  # bases of the lungs
        y = rng.uniform(-1.05, -0.85)
        for side in (-1, 1):
            tissue -= 9 * canvas.blur(_solid(canvas, disc((side * 0.45, y - 0.3), (0.36, 0.35)), 0.2), 0.02)
    return tissue


def _limb(canvas: Canvas, rng: np.random.Generator) -> Layer:
    """One to five tapering rods of soft tissue with a bone in each, as in a knee, a forearm or a hand."""
    rods = int(rng.choice((1, 2, 5)))
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    width = rng.uniform(0.75, 1.1) / rods
    tissue = np.zeros((canvas.size, canvas.size), np.float32)
    for index in range(rods):
        x = (index - (rods - 1) / 2) * 1.7 * width * (0.85 if rods > 1 else 0)
        end = -1.3 if rods < 5 else rng.uniform(-0.9, -0.6)
        line = np.column_stack([np.full(30, x), np.linspace(end, 1.3, 30)]) @ turn.T
        flesh = strip(line, 0.5 * width * np.linspace(0.85, 1.1, 30))
        tissue = np.maximum(tissue, 12 * width * _solid(canvas, flesh, 0.45 * width))
        joint = 0.30 + 0.35 * np.exp(-(((np.linspace(end, 1.3, 30) - rng.uniform(-0.3, 0.3)) / 0.25) ** 2))
        bone = canvas.inside(strip(line, 0.5 * width * joint))
        tissue += 5 * width * (0.4 * bone + 0.6 * canvas.solid(bone, 0.06))
    return canvas.blur(tissue, 0.005)


def _head(canvas: Canvas, rng: np.random.Generator) -> Layer:
    """A skull from the front or the side, on a neck."""
    aspect = rng.uniform(0.75, 1.1)
    skull = disc((rng.normal(0, 0.05), -0.2), (0.72 * aspect, 0.75), rng.normal(0, 0.02, (3, 2)))
    inside = canvas.inside(skull)
    tissue = 8 * canvas.solid(inside, 0.5) + 5 * (canvas.solid(inside, 0.04) - canvas.solid(inside, 0.16)).clip(0)
    tissue += 6 * inside * np.exp(-(((canvas.depth(inside) - 0.03) / 0.03) ** 2))
    for side in (-1, 1):
        orbit = disc((side * 0.28 * aspect, 0.02), (0.17, 0.14), rng.normal(0, 0.04, (2, 2)))
        tissue -= 3 * canvas.blur(_solid(canvas, orbit, 0.08), 0.01)
    jaw = open_curve(np.array([(-0.45 * aspect, 0.2), (-0.3, 0.6), (0, 0.72), (0.3, 0.6), (0.45 * aspect, 0.2)]))
    tissue += 4 * canvas.blur(canvas.trace([jaw], 0.10), 0.01)
    neck = np.array([(-0.32, 0.4), (0.32, 0.4), (0.42, 1.3), (-0.42, 1.3)])
    tissue = np.maximum(tissue, 7 * _solid(canvas, neck, 0.3))
    return tissue + _vertebrae(canvas, np.array([(0.0, y) for y in np.linspace(0.4, 1.25, 30)]), 7, 0.09)


def _vertebrae(canvas: Canvas, line: Points, count: int, half_width: float) -> Layer:
    """Blocks along a line, with denser end plates."""
    column = canvas.blur(_solid(canvas, strip(line, half_width), half_width), 0.008)
    along = np.linspace(0, len(line) - 1, 2 * count + 1)[1::2]
    centers = np.column_stack([np.interp(along, range(len(line)), axis) for axis in line.T])
    length = np.hypot(*(line[-1] - line[0])) / count
    direction = np.gradient(line, axis=0)[np.rint(along).astype(int)]
    across = np.column_stack([-direction[:, 1], direction[:, 0]]) / np.hypot(*direction.T)[:, None]
    toward = direction / np.hypot(*direction.T)[:, None]
    ends = [center + side * 0.42 * length * toward[i] for i, center in enumerate(centers) for side in (-1, 1)]
    plates = [
        np.array([end - half_width * across[i // 2], end + half_width * across[i // 2]]) for i, end in enumerate(ends)
    ]
    return 2.5 * column + 1.2 * canvas.blur(canvas.trace(plates, 0.02), 0.004)
