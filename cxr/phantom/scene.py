"""One chest while it is drawn: layers of line integrals that findings change.

Thickness is in centimetres of soft tissue; bone counts for more than its thickness, air for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.phantom.anatomy import Anatomy
from cxr.phantom.canvas import Canvas, Layer, Mask, Points

TRUNK_CM, LUNG_CM = 20.0, 15.0  # of tissue through the trunk; of that, air where the lungs are thickest


@dataclass
class Scene:
    """What reaches the film is `tissue + (markings − air) · (1 − filled)`."""

    canvas: Canvas
    anatomy: Anatomy
    tissue: Layer
    """All but the lungs' air and vessels."""
    air: Layer
    """What the lungs' air takes away."""
    markings: Layer
    """Lung vessels."""
    filled: Layer
    """Share of the air that fluid, cells or collapse has replaced, 0 to 1."""
    lungs: dict[int, Mask]
    """Visible lung fields by side: without what heart and great vessels cover."""
    aerated: dict[int, Mask]
    """`lungs` less what an effusion or a pneumothorax has taken."""
    behind: dict[int, Mask]
    """Lung by side that heart and great vessels cover."""
    heart: Mask

    def within(self, side: int) -> Layer:
        """1 in the aerated lung of a side and where it goes on behind the heart, soft at the edge."""
        return self.canvas.blur((self.aerated[side] | self.behind[side]).astype(np.float32), 0.004)

    def fill(self, share: Layer) -> None:
        """Replace a share of what air is left."""
        self.filled = 1 - (1 - self.filled) * (1 - share)

    def thickness(self) -> Layer:
        """The line integral, cm."""
        return np.maximum(self.tissue + (self.markings - self.air) * (1 - self.filled), 0)

    def place(self, rng: np.random.Generator, side: int, low: float, high: float) -> Points:
        """A random canonical point of an aerated lung with `low` <= y <= `high`, if there is one."""
        y = rng.uniform(low, high, 64)
        x = side * rng.uniform(0.18, 0.88, 64) * self.anatomy.cage_x(y)
        points = np.column_stack([x, y])
        inside = [bool(self.aerated[side][self.canvas.px_at(point)]) for point in points]
        if any(inside):
            return points[int(np.argmax(inside))]
        where = self.aerated[side] if self.aerated[side].any() else self.lungs[side]
        return np.array([self.canvas.x[where].mean(), self.canvas.y[where].mean()], np.float64)
