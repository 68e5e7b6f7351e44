"""Findings of the pleura: effusion, pneumothorax, thickening; functions like those in `opacities`."""

from __future__ import annotations

import numpy as np

from cxr.phantom.anatomy import SIDES
from cxr.phantom.canvas import Mask, Points
from cxr.phantom.scene import LUNG_CM, Scene


def effusion(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Fluid that fills the base up to a meniscus, highest at the chest wall; on both sides in 30 % of cases."""
    sides = SIDES if rng.random() < 0.3 else (int(rng.choice(SIDES)),)
    return [_fluid(scene, side, rng) for side in sides]


def _fluid(scene: Scene, side: int, rng: np.random.Generator) -> Mask:
    canvas, anatomy = scene.canvas, scene.anatomy
    wall = float(anatomy.cage_x(anatomy.angle_y(side)))
    level = anatomy.angle_y(side) - rng.choice([rng.uniform(0.05, 0.16), rng.uniform(0.16, 0.50)], p=[0.65, 0.35])
    climb = rng.uniform(0.10, 0.22) * np.exp(-np.clip(wall - side * canvas.x, 0, None) / rng.uniform(0.08, 0.16))
    below = canvas.y - (level - climb)
    share = 1 / (1 + np.exp(-np.clip(below / 0.014, -30, 30)))
    scene.fill((0.96 * share * scene.within(side)).astype(np.float32))
    fluid = scene.aerated[side] & (below > 0)
    scene.aerated[side] &= ~fluid
    return fluid


def pneumothorax(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Air around a collapsed lung: a dark rim without markings, bounded by a pleural line."""
    canvas, side = scene.canvas, int(rng.choice(SIDES))
    lung = _collapsed(scene, side, rng.uniform(0.12, 0.42), rng.uniform(0.15, 0.8))
    rim = scene.lungs[side] & ~canvas.inside(lung) & (side * canvas.x > 0.16)
    air = canvas.blur(rim.astype(np.float32), 0.003)
    scene.markings *= 1 - air
    scene.filled *= 1 - air
    scene.air += 0.05 * LUNG_CM * air
    scene.aerated[side] &= ~rim
    scene.fill(0.10 * canvas.blur(scene.aerated[side].astype(np.float32), 0.004))
    beside_rim = canvas.blur(rim.astype(np.float32), 0.008) > 0.05
    line = canvas.trace([lung], 0.007) * (beside_rim & scene.lungs[side])
    scene.tissue += 1.1 * canvas.blur(line, 0.0015)
    return [rim]


def _collapsed(scene: Scene, side: int, amount: float, at_base: float) -> Points:
    """The outline of a lung shrunk toward its hilum, fully at the apex and by the factor `at_base` at the bottom."""
    lung, hilum = scene.anatomy.lung(side), np.array(scene.anatomy.hilum(side))
    height = np.clip((lung[:, 1] - scene.anatomy.apex) / (scene.anatomy.angle_y(side) - scene.anatomy.apex), 0, 1)
    lateral = np.clip((side * lung[:, 0] - 0.10) / 0.20, 0, 1)
    pull = amount * lateral * (1 - (1 - at_base) * height)
    down = np.where(lung[:, 1] < hilum[1], pull, 0)  # the base stays on the diaphragm
    return lung + (hilum - lung) * np.column_stack([pull, down])


def pleural_thickening(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """A dense band along the chest wall, or an apical cap; the costophrenic angle stays sharp."""
    side = int(rng.choice(SIDES))
    inner = _cap(scene, side, rng) if rng.random() < 0.45 else _band(scene, side, rng)
    peel = scene.lungs[side] & scene.canvas.inside(inner)
    soft = scene.canvas.blur(peel.astype(np.float32), 0.005)
    scene.fill(np.float32(rng.uniform(0.4, 0.65)) * soft)
    scene.tissue += 0.9 * soft
    return [peel]


def _band(scene: Scene, side: int, rng: np.random.Generator) -> Points:
    top = rng.uniform(-0.45, -0.10)
    y = np.linspace(top, top + rng.uniform(0.28, 0.42), 20)
    wall = scene.anatomy.cage_x(y)
    thick = rng.uniform(0.030, 0.055) * np.sin(np.linspace(0, np.pi, 20)) ** 0.4 * _uneven(rng)
    outer = np.column_stack([side * (wall + 0.02), y])
    return np.vstack([outer, np.column_stack([side * (wall - thick), y])[::-1]])


def _cap(scene: Scene, side: int, rng: np.random.Generator) -> Points:
    x = np.linspace(0.08, 0.62, 20)
    thick = rng.uniform(0.05, 0.085) * _uneven(rng)
    bottom = scene.anatomy.apex + thick + 1.6 * (x - 0.29) ** 2
    above = np.full(20, scene.anatomy.apex - 0.2)
    return np.vstack([np.column_stack([side * x, above]), np.column_stack([side * x, bottom])[::-1]])


def _uneven(rng: np.random.Generator) -> np.ndarray:
    """A smooth random factor of about 1 at 20 points."""
    phase, s = rng.uniform(0, 2 * np.pi, (3, 1)), np.linspace(0, 1, 20)
    return 1 + 0.12 * np.sin(phase + np.array([[5.0], [9.0], [16.0]]) * s).sum(0)
