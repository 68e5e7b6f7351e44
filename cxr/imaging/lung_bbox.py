"""The square around the lungs: found from a mask, cut out of the image at one size, with the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from cxr.imaging.geometry import ResizeTransform, cut

MARGIN = 0.05  # of the side of the smallest enclosing square, added on each of its sides
AREAS = 0.05, 0.6  # shares of the image that lungs may cover; Montgomery's and Shenzhen's: .09 to .37
SPECK = 0.02  # share of the largest component's area below which the second is none


@dataclass(frozen=True)
class LungSquare:
    """A square of whole pixels; it may reach beyond an image that is not square, never beyond a square one.

    Attributes:
        x, y: its left and upper edge; may be negative.
        side: at least 1.
        reason: why it is the whole image; empty where lungs were found.
    """

    x: int
    y: int
    side: int
    reason: str = ""

    def frame(self, size: int) -> ResizeTransform:
        """How the pixels of `crop(…, size)` lie on the image that was cropped."""
        scale = self.side / size
        return ResizeTransform(scale, scale, self.x, self.y)

    def crop(self, pixels_HW: np.ndarray, size: int) -> np.ndarray:
        """The square resized to (size, size), uint8 or uint16 as given; what lies beyond the image is 0."""
        return cut(pixels_HW, (self.x, self.y), (self.x + self.side, self.y + self.side), size)

    def on_original(self, frame: ResizeTransform, height: int, width: int) -> LungSquare:
        """This square of stored pixels in whole pixels of the original (height, width) on which `frame` puts them.

        Nothing of it is lost: its sides are rounded outwards. To crop the original keeps what storing has blurred.
        """
        if self.reason:
            return whole_image(height, width, self.reason)
        corners = frame.to_original(np.array([[self.x, self.y], [self.x + self.side, self.y + self.side]]))
        return _around(corners[0], corners[1], height, width)


def lung_square(mask_HW: np.ndarray, margin: float = MARGIN) -> LungSquare:
    """The smallest square that encloses the lungs of a bool mask, with a margin, in the mask's pixels.

    Only the two largest connected components count, so that false specks do not widen it. It is moved to lie
    within the image; where a side of the image is shorter than the square, it reaches beyond it on both sides.
    A mask that is empty, or covers less or more of the image than lungs can (`AREAS`), gives the whole image.

    Args:
        margin: share of the smallest square's side, added on each side.
    """
    height, width = mask_HW.shape
    lungs = largest_two(mask_HW)
    share = float(lungs.mean())
    if reason := _absurd(share):
        return whole_image(height, width, reason)
    y, x = (np.flatnonzero(lungs.any(axis)) for axis in (1, 0))
    low, high = np.array([x[0], y[0]]), np.array([x[-1] + 1, y[-1] + 1])
    wider = margin * (high - low).max()
    return _around(low - wider, high + wider, height, width)


def whole_image(height: int, width: int, reason: str = "") -> LungSquare:
    """The smallest square around the whole image, which lies in its middle, as `geometry.fit` puts it."""
    side = max(height, width)
    return LungSquare((width - side) // 2, (height - side) // 2, side, reason)


def largest_two(mask_HW: np.ndarray) -> np.ndarray:
    """The bool mask's two largest 8-connected components; one, where all others are specks beside it."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    order = np.argsort(-areas, kind="stable")[:2]
    kept = [label + 1 for label in order.tolist() if areas[label] >= SPECK * areas[order[0]]]
    return np.isin(np.arange(count), kept)[np.asarray(labels, np.intp)]


def _absurd(share: float) -> str:
    if not share:
        return "the lung mask is empty"
    if share < AREAS[0]:
        return f"the lung mask covers {share:.1%} of the image, lungs at least {AREAS[0]:.0%}"
    if share > AREAS[1]:
        return f"the lung mask covers {share:.1%} of the image, lungs at most {AREAS[1]:.0%}"
    return ""


def _around(low_xy: np.ndarray, high_xy: np.ndarray, height: int, width: int) -> LungSquare:
    """The smallest square of whole pixels that holds a box and lies within the image, as far as it has room."""
    low_xy, high_xy = np.floor(low_xy + 1e-6), np.ceil(high_xy - 1e-6)
    side = min(int((high_xy - low_xy).max()), max(height, width))
    x, y = (
        _start(math.floor((low + high - side) / 2), side, length)
        for low, high, length in zip(low_xy.tolist(), high_xy.tolist(), (width, height), strict=True)
    )
    return LungSquare(x, y, side)


def _start(wanted: int, side: int, length: int) -> int:
    """Where a side begins: as wanted, moved into the image; around its middle where it is longer than the image."""
    return min(max(wanted, 0), length - side) if side <= length else (length - side) // 2
