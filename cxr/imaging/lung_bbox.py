"""The square around the lungs: computed from a mask and cropped from the image, with the transform back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from cxr.imaging.geometry import ResizeTransform, cut

MARGIN = 0.05  # added on each side, as a fraction of the smallest enclosing square's side
AREAS = 0.05, 0.6  # plausible fractions of the image covered by lungs; Montgomery and Shenzhen: .09 to .37
SPECK = 0.02  # a second component below this fraction of the largest one's area is ignored


@dataclass(frozen=True)
class LungSquare:
    """A square of whole pixels. It may extend beyond a non-square image, but never beyond a square one.

    Attributes:
        x, y: left and upper edge; may be negative.
        side: length of its sides, at least 1.
        reason: why it is the whole image; empty if lungs were detected.
    """

    x: int
    y: int
    side: int
    reason: str = ""

    @property
    def status(self) -> str:
        """Value in column `crop_status`."""
        return "lungs"

    def transform(self, size: int) -> ResizeTransform:
        """Map from the pixels of `crop(…, size)` to the image that was cropped."""
        scale = self.side / size
        return ResizeTransform(scale, scale, self.x, self.y)

    def crop(self, pixels_HW: np.ndarray, size: int) -> np.ndarray:
        """Crop the square and resize it to (size, size), same dtype; 0 outside the image."""
        return cut(pixels_HW, (self.x, self.y), (self.x + self.side, self.y + self.side), size)

    def on_original(self, transform: ResizeTransform, height: int, width: int) -> LungSquare:
        """Map this square of stored pixels to whole pixels of the original (height, width) by their `transform`.

        Its sides are rounded outwards. Cropping the original keeps the detail that stored pixels have lost.
        """
        if self.reason:
            return whole_image(height, width, self.reason)
        corners = transform.to_original(np.array([[self.x, self.y], [self.x + self.side, self.y + self.side]]))
        return _around(corners[0], corners[1], height, width)


def lung_square(mask_HW: np.ndarray, margin: float = MARGIN) -> LungSquare:
    """The smallest square that encloses the lungs of a bool mask, plus a margin, in the mask's pixels.

    Only the two largest connected components count, so that false specks do not widen it. It is moved into the image;
    if a side of the image is shorter than the square, the square extends beyond it on both sides. A mask that is
    empty, or covers an implausible fraction of the image (`AREAS`), gives the whole image.

    Args:
        margin: added on each side, as a fraction of the smallest square's side.
    """
    height, width = mask_HW.shape
    lungs = largest_two(mask_HW)
    area_fraction = float(lungs.mean())
    if reason := _implausible(area_fraction):
        return whole_image(height, width, reason)
    y, x = (np.flatnonzero(lungs.any(axis)) for axis in (1, 0))
    low, high = np.array([x[0], y[0]]), np.array([x[-1] + 1, y[-1] + 1])
    margin_px = margin * (high - low).max()
    return _around(low - margin_px, high + margin_px, height, width)


def whole_image(height: int, width: int, reason: str = "") -> LungSquare:
    """The smallest square around the whole image, which is centered in it as by `geometry.fit`."""
    side = max(height, width)
    return LungSquare((width - side) // 2, (height - side) // 2, side, reason)


def largest_two(mask_HW: np.ndarray) -> np.ndarray:
    """The bool mask's two largest 8-connected components, or only the largest if the second is a speck."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    order = np.argsort(-areas, kind="stable")[:2]
    lungs = [label + 1 for label in order.tolist() if areas[label] >= SPECK * areas[order[0]]]
    return np.isin(np.arange(count), lungs)[np.asarray(labels, np.intp)]


def _implausible(area_fraction: float) -> str:
    if not area_fraction:
        return "the lung mask is empty"
    if area_fraction < AREAS[0]:
        return f"the lung mask covers {area_fraction:.1%} of the image, expected at least {AREAS[0]:.0%}"
    if area_fraction > AREAS[1]:
        return f"the lung mask covers {area_fraction:.1%} of the image, expected at most {AREAS[1]:.0%}"
    return ""


def _around(low_xy: np.ndarray, high_xy: np.ndarray, height: int, width: int) -> LungSquare:
    """The smallest square of whole pixels around a box, within the image if it fits."""
    low_xy, high_xy = np.floor(low_xy + 1e-6), np.ceil(high_xy - 1e-6)
    side = min(int((high_xy - low_xy).max()), max(height, width))
    x, y = (
        _start(math.floor((low + high - side) / 2), side, length)
        for low, high, length in zip(low_xy.tolist(), high_xy.tolist(), (width, height), strict=True)
    )
    return LungSquare(x, y, side)


def _start(preferred: int, side: int, length: int) -> int:
    """Start of a side: moved into the image, or centered if the side is longer than the image."""
    return min(max(preferred, 0), length - side) if side <= length else (length - side) // 2
