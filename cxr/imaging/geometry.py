"""From an image of any shape to a square of one size, and the frame by which coordinates map back exactly.

Coordinates have edges at integers: pixel i covers [i, i + 1], x to the right, y down.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Frame:
    """How stored pixels lie on the original image: original_px = stored_px * scale + offset, for x and y."""

    x_scale: float = 1.0
    y_scale: float = 1.0
    x_offset: float = 0.0
    y_offset: float = 0.0

    def to_original(self, points_xy: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the stored square -> float64 points of the original image, both in pixels."""
        return np.asarray(points_xy, np.float64) * self._scale + self._offset

    def from_original(self, points_xy: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the original image -> float64 points of the stored square, both in pixels."""
        return (np.asarray(points_xy, np.float64) - self._offset) / self._scale

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.x_scale, self.y_scale])

    @property
    def _offset(self) -> np.ndarray:
        return np.array([self.x_offset, self.y_offset])


def fit(pixels: np.ndarray, size: int) -> tuple[np.ndarray, Frame]:
    """Resize (H, W) pixels into a (size, size) square: the long side fills it, the short one is padded by 0.

    The picture lies in the middle; where the padding is odd, its larger part is right or below. Pixels are
    averaged by area when shrunk and interpolated linearly when enlarged. The frame's scales are those of the
    whole numbers of pixels that the sides really became.
    """
    height, width = pixels.shape
    longest = max(height, width)
    inner_height, inner_width = (max(1, round(side * size / longest)) for side in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    x_scale, y_scale = width / inner_width, height / inner_height
    frame = Frame(x_scale, y_scale, -left * x_scale, -top * y_scale)
    return _placed(pixels, size, frame), frame


def fit_mask(mask: np.ndarray, size: int, frame: Frame) -> np.ndarray:
    """A mask (H, W) bool in the frame that `fit` gave its image: true where half of a pixel is covered."""
    return _placed(mask.astype(np.uint8) * np.uint8(255), size, frame) >= 128


def _placed(pixels: np.ndarray, size: int, frame: Frame) -> np.ndarray:
    height, width = pixels.shape
    inner_height, inner_width = round(height / frame.y_scale), round(width / frame.x_scale)
    top, left = round(-frame.y_offset / frame.y_scale), round(-frame.x_offset / frame.x_scale)
    shrinking = max(height, width) >= size
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    inner = cv2.resize(pixels, (inner_width, inner_height), interpolation=method)
    if inner.shape == (size, size):
        return inner
    square = np.zeros((size, size), pixels.dtype)
    square[top : top + inner_height, left : left + inner_width] = inner
    return square
