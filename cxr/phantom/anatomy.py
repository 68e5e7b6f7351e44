"""A patient's anatomy: varying parameters, and the outlines of lungs, heart, bones and body that follow from them.

All in the canonical frame (see `canvas`). `side` is −1 for the patient's right (left in the image) and +1
for the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from cxr.phantom.canvas import Points, closed_curve, disc, open_curve, strip

SIDES = (-1, 1)
RIBS = 9
_CAGE_TOP = -0.86
_HILUM = {-1: (-0.185, -0.09), 1: (0.20, -0.15)}


@dataclass(frozen=True)
class Anatomy:
    """Parameters that differ between patients. Lengths are in canonical units."""

    width: float  # half the inner width of the thoracic cage
    apex: float  # y of the lungs' top
    dome: float  # y of the right diaphragm's top
    dome_step: float  # by how much the left dome is lower
    dome_height: float  # from the costophrenic angle to the dome's top
    heart_ratio: float  # cardiothoracic ratio: widest heart over widest thorax
    heart_tilt: float  # how low the apex of the heart is
    knob: float  # radius of the aortic knob
    fat: float  # thickness of the chest wall
    shoulder: float  # y of the acromion
    clavicle_rise: float
    rib_fall: float  # how steeply ribs slope
    rib_width: float
    bone: float  # relative density
    scoliosis: float
    breast: float  # 0 for none
    arms: float  # abduction
    age: int
    sex: str  # "M" or "F"

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Anatomy:
        """A random adult with a cardiothoracic ratio below one half."""
        female = rng.random() < 0.45
        age = int(np.clip(rng.normal(50, 17), 18, 90))
        fat = float(np.clip(rng.gamma(4, 0.028), 0.04, 0.24))
        return cls(
            width=rng.normal(0.745 if female else 0.775, 0.025),
            apex=rng.normal(-0.76, 0.02),
            dome=rng.normal(0.27, 0.05),
            dome_step=abs(rng.normal(0.05, 0.03)),
            dome_height=rng.normal(0.185, 0.025),
            heart_ratio=float(np.clip(rng.normal(0.42 + 0.0006 * (age - 50), 0.025), 0.34, 0.48)),
            heart_tilt=rng.normal(0, 0.03),
            knob=rng.normal(0.062 + 0.0004 * (age - 50), 0.008),
            fat=fat,
            shoulder=rng.normal(-0.70, 0.04),
            clavicle_rise=rng.normal(0.20, 0.05),
            rib_fall=rng.normal(1.0, 0.1),
            rib_width=rng.normal(0.021, 0.0015),
            bone=float(np.clip(rng.normal(1.0 - 0.004 * (age - 50), 0.12), 0.6, 1.4)),
            scoliosis=rng.normal(0, 0.012),
            breast=float(rng.uniform(0.4, 1.2)) if female else 0.0,
            arms=rng.normal(0, 0.05),
            age=age,
            sex="F" if female else "M",
        )

    def with_wide_heart(self, ratio: float) -> Anatomy:
        """Cardiomegaly: a cardiothoracic ratio above one half."""
        return replace(self, heart_ratio=ratio, heart_tilt=self.heart_tilt + 0.02)

    def hyperinflated(self, amount: float) -> Anatomy:
        """Emphysema: low flat diaphragm, wide cage, narrow heart, horizontal ribs; `amount` from 0 to 1."""
        return replace(
            self,
            width=self.width * (1 + 0.03 * amount),
            dome=self.dome + 0.05 + 0.08 * amount,
            dome_height=self.dome_height * (1 - 0.62 * amount),
            heart_ratio=self.heart_ratio * (1 - 0.14 * amount),
            rib_fall=self.rib_fall * (1 - 0.2 * amount),
        )

    def breathing(self, depth: float) -> Anatomy:
        """The same patient with the diaphragm `depth` lower."""
        return replace(self, dome=self.dome + depth)

    def cage_x(self, y: ArrayLike) -> np.ndarray:
        """Half the inner width of the thorax at heights `y`."""
        t = np.clip((np.asarray(y) - _CAGE_TOP) / (0.40 - _CAGE_TOP), 0, 1)
        return self.width * (1 - (1 - t) ** 3.1) ** 0.42

    def dome_y(self, side: int) -> float:
        return self.dome + (self.dome_step if side > 0 else 0.0)

    def angle_y(self, side: int) -> float:
        """Height of the costophrenic angle."""
        return self.dome_y(side) + self.dome_height

    def diaphragm(self, side: int) -> Points:
        """The line of the diaphragm from the costophrenic angle to the midline."""
        base, top = self.angle_y(side), self.dome_y(side)
        lateral, crest = float(self.cage_x(base)), 0.52 * self.width
        x = np.concatenate([np.linspace(lateral, crest, 24), np.linspace(crest, 0.09, 14)[1:]])
        out = np.where(x > crest, (x - crest) / (lateral - crest), (crest - x) / crest)
        fall = np.where(x > crest, out**2.6 * (base - top), out**2.0 * 0.11)
        return np.column_stack([side * x, top + fall])

    def lung(self, side: int) -> Points:
        """The outline of a lung, including the parts behind the heart and the great vessels."""
        base = self.angle_y(side)
        y = np.linspace(self.apex + 0.12, base, 30)[:-1]
        lateral = np.column_stack([side * self.cage_x(y), y])
        apex = [
            (0.105, -0.50),
            (0.125, -0.60),
            (0.19, self.apex + 0.045),
            (0.29, self.apex),
            (0.385, self.apex + 0.025),
        ]
        top = open_curve([(side * x, y) for x, y in apex] + [tuple(lateral[0])], 8)[:-1]
        return np.vstack([top, lateral, self.diaphragm(side)])

    def heart(self) -> Points:
        """The cardiac silhouette: right atrium on the left of the image, apex on its right."""
        whole = self.heart_ratio * 2 * self.width
        right, left = 0.32 * whole, 0.68 * whole
        base, tilt = self.dome + 0.07, self.heart_tilt
        return closed_curve(
            [
                (-0.10, -0.26),
                (-0.85 * right, -0.06),
                (-right, 0.08),
                (-0.90 * right, base - 0.04),
                (-0.35 * right, base + 0.04),
                (0.40 * left, base + 0.08 + tilt),
                (0.82 * left, base + 0.05 + tilt),
                (0.995 * left, base - 0.06 + tilt),
                (0.94 * left, 0.50 * (base + tilt) - 0.055),
                (0.74 * left, 0.22 * (base + tilt) - 0.105),
                (0.44 * left + 0.04, -0.19),
                (0.15, -0.25),
            ]
        )

    def mediastinum(self) -> Points:
        """Great vessels above the heart: superior vena cava; aortic knob and pulmonary trunk on the patient's
        left."""
        knob, trunk = 0.095 + 1.05 * self.knob, 0.145 + 0.5 * self.knob
        left = [(0.085, -0.64), (0.095, -0.50), (knob * 0.97, -0.44), (knob, -0.385), (knob * 0.86, -0.325)]
        left += [(trunk * 0.97, -0.26), (trunk, -0.21), (0.15, -0.10), (0.12, 0.05)]
        right = [
            (-0.10, 0.05),
            (-0.135, -0.05),
            (-0.125, -0.2),
            (-0.125, -0.42),
            (-0.11, -0.54),
            (-0.115, -0.66),
        ]
        return closed_curve([*left, *right])

    def aorta(self) -> Points:
        """The descending aorta, left of the spine."""
        y = np.linspace(-0.40, 0.45, 16)
        return strip(np.column_stack([0.085 + 0.4 * self.knob * (1 - (y + 0.40)), y]), self.knob * 0.85)

    def hilum(self, side: int) -> tuple[float, float]:
        return _HILUM[side]

    def spine_x(self, y: ArrayLike) -> np.ndarray:
        return self.scoliosis * np.sin(2.2 * np.asarray(y) + 0.5)

    def vertebrae(self) -> np.ndarray:
        """(N, 4): x, y, half width, half height of the vertebral bodies, from the neck down."""
        gap = np.concatenate([np.linspace(0.062, 0.085, 8), np.linspace(0.09, 0.15, 16)])
        y = -1.35 + np.cumsum(gap)
        half_width = np.interp(y, [-1.3, -0.8, -0.4, 0.6, 1.3], [0.075, 0.072, 0.070, 0.088, 0.105])
        return np.column_stack([self.spine_x(y), y, half_width, gap * 0.41])

    def ribs(self, side: int) -> tuple[list[Points], list[Points]]:
        """Center lines of the posterior and the anterior arcs of the ribs, first rib first."""
        posterior, anterior = [], []
        quarter = np.linspace(0, np.pi / 2, 24)
        for i in range(RIBS):
            head = -0.715 + 0.108 * i + 0.0012 * i * i
            fall = self.rib_fall * (0.07 + 0.030 * i + 0.0012 * i * i)
            turn = head + fall
            edge = float(self.cage_x(turn)) + 0.012
            x = 0.085 + (edge - 0.085) * np.sin(quarter)
            slope = 0.25 * np.sin(quarter) + 0.75 * (1 - np.cos(quarter))
            posterior.append(np.column_stack([side * x, head - 0.02 * np.sin(2 * quarter) + fall * slope]))
            if i < 7:
                end = 0.20 + 0.02 * i + 0.004 * i * i
                drop = self.rib_fall * (0.13 + 0.022 * i)
                x = end + (edge - end) * np.cos(quarter)
                anterior.append(np.column_stack([side * x, turn + drop * np.sin(quarter) ** 0.9]))
        return posterior, anterior

    def clavicle(self, side: int) -> Points:
        line = open_curve(
            [
                (side * 0.085, -0.475),
                (side * 0.25, -0.535 - 0.2 * self.clavicle_rise),
                (side * 0.50, -0.535 - 0.75 * self.clavicle_rise),
                (side * 0.72, -0.53 - self.clavicle_rise),
                (side * 0.90, -0.52 - self.clavicle_rise),
            ]
        )
        width = np.interp(np.linspace(0, 1, len(line)), [0, 0.12, 0.5, 0.85, 1], [0.040, 0.030, 0.023, 0.026, 0.016])
        return strip(line, width)

    def scapula(self, side: int) -> Points:
        top = self.shoulder
        points = [
            (0.60, top + 0.05),
            (0.90, top + 0.06),
            (0.93, top + 0.17),
            (0.84, top + 0.32),
            (0.76, top + 0.62),
        ]
        points += [(0.71, top + 0.66), (0.66, top + 0.45), (0.61, top + 0.22)]
        return closed_curve([(side * (x + 0.03 + self.arms * 0.3), y) for x, y in points])

    def humerus(self, side: int) -> Points:
        top = self.shoulder
        line = open_curve([(1.0, top + 0.06), (1.03, top + 0.20), (1.12, top + 0.5), (1.28, top + 1.0)])
        line[:, 0] += self.arms * np.linspace(0, 1, len(line))
        width = np.interp(np.linspace(0, 1, len(line)), [0, 0.08, 0.2, 0.4, 1], [0.05, 0.095, 0.085, 0.06, 0.052])
        return strip(line * (side, 1), width)

    def body(self) -> Points:
        """The outline of the body: neck, shoulders, trunk, and upper arms that extend beyond the image."""
        wall, top, out = self.width + 0.05 + self.fat, self.shoulder, self.arms
        right_half = [
            (0.22 + 0.3 * self.fat, -1.8),
            (0.21 + 0.3 * self.fat, -1.05),
            (0.34 + 0.3 * self.fat, -0.90),
            (0.70, top - 0.12 - 0.3 * self.fat),
            (1.03, top - 0.06 - 0.2 * self.fat),
            (1.22 + out, top + 0.20),
            (1.48 + 2 * out, 0.6),
            (1.20 + 1.5 * out, 0.70),
            (wall + 0.16 + 0.7 * out, 0.12),
            (wall + 0.045 + 0.2 * out, -0.17),
            (wall + 0.01, 0.0),
            (wall, 0.35),
            (wall + 0.01, 0.9),
            (wall + 0.02, 1.9),
        ]
        return closed_curve(right_half + [(-x, y) for x, y in right_half[::-1]], 8)

    def breasts(self) -> list[Points]:
        radius = 0.20 + 0.10 * self.breast
        return [disc((side * 0.47, 0.10 + 0.12 * self.breast), (radius * 1.1, radius)) for side in SIDES]
