"""A chest while it is drawn: layers of line integrals that findings change.

Thickness is in centimeters of soft tissue; bone counts for more than its thickness, air for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.phantom.anatomy import Anatomy
from cxr.phantom.canvas import Canvas, Layer, Mask, Points

TRUNK_CM, LUNG_CM = 20.0, 15.0  # tissue through the trunk; maximum air within it


@dataclass
class Scene:
    """Layers of a chest; the thickness is `tissue + (markings − air) · (1 − filled)`."""

    canvas: Canvas
    anatomy: Anatomy
    tissue: Layer
    """Everything except the air and the vessels of the lungs."""
    air: Layer
    """Thickness that the lungs' air displaces."""
    markings: Layer
    """Lung vessels."""
    filled: Layer
    """Fraction of the air replaced by fluid, cells or collapse, 0 to 1."""
    lungs: dict[int, Mask]
    """Visible lung fields by side, without the parts covered by heart and great vessels."""
    aerated: dict[int, Mask]
    """`lungs` without the parts displaced by an effusion or a pneumothorax."""
    behind: dict[int, Mask]
    """Parts of the lungs covered by heart and great vessels, by side."""
    heart: Mask

    def within(self, side: int) -> Layer:
        """1 in the aerated lung of a side, including the part behind the heart, with soft edges."""
        return self.canvas.blur((self.aerated[side] | self.behind[side]).astype(np.float32), 0.004)

    def fill(self, fraction: Layer) -> None:
        """Replace a fraction of the remaining air."""
        self.filled = 1 - (1 - self.filled) * (1 - fraction)

    def thickness(self) -> Layer:
        """The line integral in cm."""
        return np.maximum(self.tissue + (self.markings - self.air) * (1 - self.filled), 0)

    def place(self, rng: np.random.Generator, side: int, low: float, high: float) -> Points:
        """A random canonical point in an aerated lung, with `low` <= y <= `high` if possible."""
        y = rng.uniform(low, high, 64)
        x = side * rng.uniform(0.18, 0.88, 64) * self.anatomy.cage_x(y)
        points = np.column_stack([x, y])
        inside = [bool(self.aerated[side][self.canvas.px_at(point)]) for point in points]
        if any(inside):
            return points[int(np.argmax(inside))]
        where = self.aerated[side] if self.aerated[side].any() else self.lungs[side]
        return np.array([self.canvas.x[where].mean(), self.canvas.y[where].mean()], np.float64)
