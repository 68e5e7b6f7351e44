"""From an image of any shape to a square of one size, and the frame by which coordinates map back exactly.

Coordinates have edges at integers: pixel i covers [i, i + 1], x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

_WHOLE = 1e-6  # by which a coordinate may differ from that of a pixel's edge


@dataclass(frozen=True)
class ResizeTransform:
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

    def then(self, outer: ResizeTransform) -> ResizeTransform:
        """How pixels of this frame lie on the image on which those of `outer` lie: a crop of a stored square, say."""
        scale = self._scale * outer._scale
        offset = self._offset * outer._scale + outer._offset
        return ResizeTransform(*scale.tolist(), *offset.tolist())

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.x_scale, self.y_scale])

    @property
    def _offset(self) -> np.ndarray:
        return np.array([self.x_offset, self.y_offset])


def fit(pixels: np.ndarray, size: int) -> tuple[np.ndarray, ResizeTransform]:
    """Resize (H, W) pixels into a (size, size) square: the long side fills it, the short one is padded by 0.

    The picture lies in the middle; where the padding is odd, its larger part is right or below. Pixels are
    averaged by area when shrunk and interpolated linearly when enlarged. The frame's scales are those of the
    whole numbers of pixels that the sides really became.
    """
    height, width = pixels.shape
    frame = fitted_transform(height, width, size)
    return _placed(pixels, size, frame), frame


def fitted_transform(height: int, width: int, size: int) -> ResizeTransform:
    """The frame of `fit` for an image of this height and width."""
    longest = max(height, width)
    inner_height, inner_width = (max(1, round(side * size / longest)) for side in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    x_scale, y_scale = width / inner_width, height / inner_height
    return ResizeTransform(x_scale, y_scale, -left * x_scale, -top * y_scale)


def fit_mask(mask: np.ndarray, size: int, frame: ResizeTransform) -> np.ndarray:
    """A mask (H, W) bool in the frame of its image, of `fit` or of a `cut`: true where half of a pixel is covered."""
    return _placed(mask.astype(np.uint8) * np.uint8(255), size, frame) >= 128


def cut(pixels: np.ndarray, low_xy: Sequence[int], high_xy: Sequence[int], size: int) -> np.ndarray:
    """The box of whole pixels from `low_xy` up to `high_xy`, resized to (size, size); beyond the image it is 0.

    Averaged by area when shrunk, interpolated linearly when enlarged.
    """
    (x0, y0), (x1, y1) = low_xy, high_xy
    height, width = pixels.shape
    top, left, bottom, right = max(0, y0), max(0, x0), min(height, y1), min(width, x1)
    box = np.zeros((y1 - y0, x1 - x0), pixels.dtype)
    if bottom > top and right > left:
        box[top - y0 : bottom - y0, left - x0 : right - x0] = pixels[top:bottom, left:right]
    method = cv2.INTER_AREA if max(box.shape) >= size else cv2.INTER_LINEAR
    return cv2.resize(box, (size, size), interpolation=method)


def mask_to_original(mask: np.ndarray, frame: ResizeTransform, height: int, width: int) -> np.ndarray:
    """A mask of stored pixels (H, W), bool or shares in [0, 1], on its original image: bool (height, width).

    True where the shares, interpolated linearly between pixel centers, reach half: smooth outlines need shares,
    and a decided mask keeps its pixels' corners. False where the stored pixels do not reach. The padding that
    `fit` adds has no influence.
    """
    square = np.array([[0, 0], mask.shape[::-1]])
    whole = np.array([[0, 0], [width, height]])
    (x0, y0), (x1, y1) = _whole_pixels(frame.to_original(square), whole[1])  # of the original, where the mask reaches
    (left, top), (right, bottom) = _whole_pixels(frame.from_original(whole), square[1])  # of the mask, unpadded
    found = np.zeros((height, width), bool)
    if x1 > x0 and y1 > y0 and right > left and bottom > top:
        step = 1 / frame._scale
        first = (np.array([x0, y0]) + 0.5 - frame._offset) * step - 0.5 - (left, top)
        shares = cv2.warpAffine(
            mask[top:bottom, left:right].astype(np.float32),
            np.column_stack([np.diag(step), first]),
            (x1 - x0, y1 - y0),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        found[y0:y1, x0:x1] = shares >= 0.5
    return found


def _whole_pixels(corners_xy: np.ndarray, shape_xy: np.ndarray) -> list[list[int]]:
    return np.rint(np.clip(corners_xy, 0, shape_xy)).astype(int).tolist()


def _placed(pixels: np.ndarray, size: int, frame: ResizeTransform) -> np.ndarray:
    height, width = pixels.shape
    corners = frame.from_original(np.array([[0, 0], [width, height]]))
    if np.abs(corners - np.rint(corners).clip(0, size)).max() > _WHOLE:  # not all of the image lies on whole pixels
        low, high = np.rint(frame.to_original(np.array([[0, 0], [size, size]]))).astype(int).tolist()
        return cut(pixels, low, high, size)
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
