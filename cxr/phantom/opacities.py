"""Findings within the lungs, drawn into a `Scene`.

Every function takes (scene, rng), changes the scene's layers and returns one mask per instance; the caller keeps
visible ones. Sizes follow the boxes of ChestX-ray14 (Wang et al. 2017), where 512 px are one unit.
"""

from __future__ import annotations

import numpy as np

from cxr.phantom.anatomy import SIDES
from cxr.phantom.canvas import Layer, Mask, Points, closed_curve, disc, open_curve, strip
from cxr.phantom.scene import Scene

CM_PER_UNIT = 19.0


def nodule(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """One to three round densities; √(box area) is about 69 px at 1024."""
    count = 1 + int(rng.choice(3, p=[0.7, 0.2, 0.1]))
    return [_round(scene, rng, 0.0665 * float(np.exp(rng.normal(0, 0.14))), 0.03) for _ in range(count)]


def mass(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """One lobulated density; √(box area) is about 124 px at 1024."""
    return [_round(scene, rng, 0.112 * float(np.exp(rng.normal(0, 0.14))), 0.07)]


def _round(scene: Scene, rng: np.random.Generator, radius: float, roughness: float) -> Mask:
    canvas = scene.canvas
    center = scene.place(rng, int(rng.choice(SIDES)), -0.55, scene.anatomy.dome - 0.03)
    outline = disc(center, radius * np.array([1.0, rng.uniform(0.85, 1.15)]), rng.normal(0, roughness, (4, 2)))
    shape = canvas.inside(outline)
    chord = 2 * radius * CM_PER_UNIT * rng.uniform(1.2, 1.8)
    profile = 0.3 * shape.astype(np.float32) + 0.7 * canvas.solid(shape, radius)
    scene.tissue += chord * canvas.blur(profile, 0.006)
    return shape & (scene.lungs[-1] | scene.lungs[1] | scene.heart)


def consolidation(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """A lobe or most of it: dense, homogeneous, with a sharp edge at a fissure and air bronchograms."""
    canvas, side = scene.canvas, int(rng.choice(SIDES))
    fissure, slope = rng.uniform(-0.24, -0.08), rng.normal(0, 0.12)
    line = fissure + slope * (side * canvas.x - 0.3)
    upper = rng.random() < 0.4
    past = (line - canvas.y) if upper else (canvas.y - line)
    extent = rng.uniform(0.28, 0.48)
    far = _sigmoid((extent - past) / 0.05)  # the edge away from the fissure is blurred
    field = _sigmoid(past / 0.006) * far * (0.85 + _mottle(scene, rng, 0.07))
    field *= rng.uniform(0.65, 0.9) * scene.within(side)
    field *= 1 - 0.4 * canvas.blur(_bronchi(scene, side, upper, rng), 0.004)
    scene.fill(np.clip(field, 0, 1).astype(np.float32))
    return [scene.aerated[side] & (past > 0) & (past < extent)]


def _bronchi(scene: Scene, side: int, upper: bool, rng: np.random.Generator) -> Layer:
    """Five bronchi from the hilum into the lobe."""
    start = np.array(scene.anatomy.hilum(side))
    aim = np.linspace(0.1, 1.1, 5) * (-1 if upper else 1) + rng.normal(0, 0.08, 5)
    ends = start + 0.34 * np.column_stack([side * np.cos(aim), np.sin(aim)])
    middles = (start + ends) / 2 + rng.normal(0, 0.02, (5, 2))
    return scene.canvas.trace([open_curve([start, m, e], 6) for m, e in zip(middles, ends, strict=True)], 0.012)


def pneumonia(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """A patchy segmental density on one side with blurred borders."""
    side = int(rng.choice(SIDES))
    center = scene.place(rng, side, -0.25, scene.anatomy.dome + 0.02)
    field = scene.canvas.bump(center, rng.uniform(0.14, 0.24, 2), 1.4)
    field *= rng.uniform(0.55, 0.72) * (1 + _mottle(scene, rng, 0.14))
    return _vague(scene, field, [side], 0.25)


def infiltration(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Faint streaks and patches in several places of one or both lungs."""
    canvas, sides = scene.canvas, list(SIDES if rng.random() < 0.5 else rng.choice(SIDES, 1))
    field = np.zeros_like(canvas.x)
    for side in sides:
        for _ in range(rng.integers(2, 4)):
            center = scene.place(rng, side, -0.35, scene.anatomy.dome)
            field = np.maximum(field, canvas.bump(center, rng.uniform(0.10, 0.20, 2)))
    streaks = np.exp(-((canvas.texture(rng, 0.035) / 0.5) ** 2))
    field *= rng.uniform(0.32, 0.42) * (0.6 + 0.5 * streaks + _mottle(scene, rng, 0.15))
    return _vague(scene, field, sides, 0.12)


def edema(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Bat-wing pattern: perihilar haze on both sides, clear periphery; septal (Kerley B) lines at the bases."""
    canvas, grade = scene.canvas, rng.uniform(0.42, 0.68)
    field = np.zeros_like(canvas.x)
    for side in SIDES:
        x, y = scene.anatomy.hilum(side)
        field += canvas.bump((x + side * 0.12, y + 0.10), (rng.uniform(0.22, 0.28), rng.uniform(0.28, 0.36)), 1.7)
    field *= grade * (1 + _mottle(scene, rng, 0.13))
    scene.markings *= 1.35
    scene.tissue += 0.7 * canvas.trace(_kerley_lines(scene, rng), 0.006)
    return _vague(scene, field, list(SIDES), 0.45 * grade)


def _kerley_lines(scene: Scene, rng: np.random.Generator) -> list[Points]:
    lines = []
    for side in SIDES:
        for y in scene.anatomy.angle_y(side) - rng.uniform(0.06, 0.34, 9):
            wall = float(scene.anatomy.cage_x(y)) - 0.008
            lines.append(np.array([(side * wall, y), (side * (wall - rng.uniform(0.05, 0.09)), y - 0.006)]))
    return lines


def atelectasis(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Collapsed lung: plate-like bands above the diaphragm, or a wedge with its tip at the hilum."""
    side = int(rng.choice(SIDES))
    outlines = _plates(scene, side, rng) if rng.random() < 0.6 else [_wedge(scene, side, rng)]
    shape = scene.canvas.fill(outlines)
    scene.fill(scene.canvas.blur(shape, 0.005) * scene.within(side) * np.float32(rng.uniform(0.35, 0.6)))
    return [(shape > 0.5) & scene.aerated[side]]


def _plates(scene: Scene, side: int, rng: np.random.Generator) -> list[Points]:
    """Two or three nearly horizontal bands, centimeters long and millimeters thick."""
    x, y = scene.place(rng, side, scene.anatomy.dome - 0.20, scene.anatomy.dome - 0.04)
    plates = []
    for step in range(int(rng.integers(2, 4))):
        half, tilt = rng.uniform(0.12, 0.20), side * rng.normal(0.08, 0.10)
        ends = np.array([(-half, -half * tilt), (0, rng.normal(0, 0.012)), (half, half * tilt)])
        line = open_curve(np.add(ends, (x + rng.normal(0, 0.03), y - 0.075 * step)), 8)
        plates.append(strip(line, rng.uniform(0.009, 0.015) * np.sin(np.linspace(0.25, np.pi - 0.25, len(line)))))
    return plates


def _wedge(scene: Scene, side: int, rng: np.random.Generator) -> Points:
    """A triangle from the hilum to the chest wall with concave sides."""
    tip = np.add(scene.anatomy.hilum(side), (side * 0.05, 0.0))
    y = rng.choice([rng.uniform(-0.50, -0.30), rng.uniform(0.0, 0.15)])
    width = rng.uniform(0.09, 0.15)
    wall_y = y + width * np.array([-1, 0, 1])
    wall = np.column_stack([side * (scene.anatomy.cage_x(wall_y) + 0.01), wall_y])
    inner = (tip + wall) / 2 + np.column_stack([np.zeros(3), 0.25 * (y - wall_y)])
    return closed_curve(np.vstack([tip, inner[0], wall, inner[2]]), 6)


def fibrosis(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """A fine reticular pattern in the outer lower zones of both lungs."""
    canvas, anatomy = scene.canvas, scene.anatomy
    net = np.exp(-((canvas.texture(rng, 0.030) / 0.22) ** 2)) + 0.7 * np.exp(
        -((canvas.texture(rng, 0.019) / 0.25) ** 2)
    )
    zone = np.zeros_like(canvas.x)
    for side in SIDES:
        center = (
            side * rng.uniform(0.60, 0.74) * anatomy.width,
            anatomy.angle_y(side) - rng.uniform(0.14, 0.22),
        )
        zone += canvas.bump(center, (rng.uniform(0.22, 0.30), rng.uniform(0.20, 0.30)), 2.0)
    scene.tissue += (0.9 * zone * (scene.within(-1) + scene.within(1))).astype(np.float32)
    scene.fill(np.clip(zone * net * rng.uniform(0.22, 0.34), 0, 0.8).astype(np.float32))
    return [scene.aerated[side] & (zone > 0.4) for side in SIDES]


def _vague(scene: Scene, field: Layer, sides: list[int], level: float) -> list[Mask]:
    """Fill a soft field into the lungs of `sides`; a side's mask is where the blurred field exceeds `level`."""
    within = np.maximum.reduce([scene.within(side) for side in sides])
    scene.fill(np.clip(field, 0, 0.95).astype(np.float32) * within)
    coarse = scene.canvas.blur(field, 0.02)
    return [scene.aerated[side] & (coarse > level) for side in sides]


def _mottle(scene: Scene, rng: np.random.Generator, amount: float) -> Layer:
    """Mottled texture at two scales, mean 0."""
    return amount * (scene.canvas.texture(rng, 0.09) + 0.8 * scene.canvas.texture(rng, 0.032))


def _sigmoid(values: Layer) -> Layer:
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))
