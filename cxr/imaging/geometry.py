"""Resize images of any shape to squares of one size, with the transform that maps coordinates back exactly.

Coordinates have edges at integers: pixel i covers [i, i + 1], x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

_EDGE_TOLERANCE_PX = 1e-6  # a coordinate this close to a pixel's edge lies on it


@dataclass(frozen=True)
class ResizeTransform:
    """Map from stored pixels to the original image: original_px = stored_px * scale + offset, for x and y."""

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
        """Compose with `outer`, applied second: for example, a crop of a stored square with the square's
        transform."""
        scale = self._scale * outer._scale
        offset = self._offset * outer._scale + outer._offset
        return ResizeTransform(*scale.tolist(), *offset.tolist())

    def inverse(self) -> ResizeTransform:
        """The map from the original image to stored pixels."""
        return ResizeTransform(*(1 / self._scale).tolist(), *(-self._offset / self._scale).tolist())

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.x_scale, self.y_scale])

    @property
    def _offset(self) -> np.ndarray:
        return np.array([self.x_offset, self.y_offset])


def fit(pixels: np.ndarray, size: int, original: tuple[int, int] | None = None) -> tuple[np.ndarray, ResizeTransform]:
    """Resize (H, W) pixels into a (size, size) square; the long side fills it, the short side is padded with 0.

    The image is centered; odd padding has its extra pixel on the right or at the bottom. Pixels are averaged by area
    when shrunk and interpolated linearly when enlarged. The transform's scales are exact for the sides after rounding
    to whole pixels.

    Args:
        original: height and width of the original, if the pixels are a smaller copy of it; the transform is to the
            original.
    """
    height, width = original or pixels.shape
    transform = fitted_transform(height, width, size)
    own_height, own_width = pixels.shape
    to_copy = ResizeTransform(own_width / width, own_height / height)
    return _place(pixels, size, transform.then(to_copy)), transform


def fitted_transform(height: int, width: int, size: int) -> ResizeTransform:
    """The transform of `fit` for an image of this height and width."""
    longest = max(height, width)
    inner_height, inner_width = (max(1, round(side * size / longest)) for side in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    x_scale, y_scale = width / inner_width, height / inner_height
    return ResizeTransform(x_scale, y_scale, -left * x_scale, -top * y_scale)


def fit_mask(mask: np.ndarray, size: int, transform: ResizeTransform) -> np.ndarray:
    """Resize a bool mask (H, W) like its image by `fit` or `cut`; true where at least half of a pixel is covered."""
    return _place(mask.astype(np.uint8) * np.uint8(255), size, transform) >= 128


def cut(pixels: np.ndarray, low_xy: Sequence[int], high_xy: Sequence[int], size: int) -> np.ndarray:
    """Crop the box of whole pixels from `low_xy` to `high_xy` and resize it to (size, size); 0 outside the image.

    Pixels are averaged by area when shrunk and interpolated linearly when enlarged.
    """
    (x0, y0), (x1, y1) = low_xy, high_xy
    height, width = pixels.shape
    top, left, bottom, right = max(0, y0), max(0, x0), min(height, y1), min(width, x1)
    box = np.zeros((y1 - y0, x1 - x0), pixels.dtype)
    if bottom > top and right > left:
        box[top - y0 : bottom - y0, left - x0 : right - x0] = pixels[top:bottom, left:right]
    method = cv2.INTER_AREA if max(box.shape) >= size else cv2.INTER_LINEAR
    return cv2.resize(box, (size, size), interpolation=method)


def mask_to_original(mask: np.ndarray, transform: ResizeTransform, height: int, width: int) -> np.ndarray:
    """Map a mask of stored pixels (H, W), bool or probabilities in [0, 1], to its original: bool (height, width).

    True where `map_to_original` is at least 0.5. Smooth outlines need probabilities; a bool mask keeps the corners of
    its pixels. Only the part of the original around stored pixels of at least 0.5 is computed.
    """
    original = np.zeros((height, width), bool)
    inside = mask >= 0.5
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return original
    box = transform.to_original(np.array([[columns[0] - 1, rows[0] - 1], [columns[-1] + 2, rows[-1] + 2]]))
    x0, y0 = np.floor(box[0].clip(0, (width, height))).astype(int).tolist()
    x1, y1 = np.ceil(box[1].clip(0, (width, height))).astype(int).tolist()
    if x1 > x0 and y1 > y0:
        of_box = transform.then(ResizeTransform(x_offset=-x0, y_offset=-y0))
        original[y0:y1, x0:x1] = map_to_original(mask, of_box, y1 - y0, x1 - x0) >= 0.5
    return original


def map_to_original(values: np.ndarray, transform: ResizeTransform, height: int, width: int) -> np.ndarray:
    """Map values of stored pixels (H, W) to their original: float32 (height, width).

    Interpolated linearly between pixel centers; 0 outside the stored pixels. The padding added by `fit` has no
    influence.
    """
    square = np.array([[0, 0], values.shape[::-1]])
    whole = np.array([[0, 0], [width, height]])
    (x0, y0), (x1, y1) = _whole_pixels(
        transform.to_original(square), whole[1]
    )  # the part of the original that the values cover
    (left, top), (right, bottom) = _whole_pixels(
        transform.from_original(whole), square[1]
    )  # the part of the values without padding
    result = np.zeros((height, width), np.float32)
    if x1 > x0 and y1 > y0 and right > left and bottom > top:
        step = 1 / transform._scale
        first = (np.array([x0, y0]) + 0.5 - transform._offset) * step - 0.5 - (left, top)
        result[y0:y1, x0:x1] = cv2.warpAffine(
            values[top:bottom, left:right].astype(np.float32),
            np.column_stack([np.diag(step), first]),
            (x1 - x0, y1 - y0),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return result


def _whole_pixels(corners_xy: np.ndarray, shape_xy: np.ndarray) -> list[list[int]]:
    return np.rint(np.clip(corners_xy, 0, shape_xy)).astype(int).tolist()


def _place(pixels: np.ndarray, size: int, transform: ResizeTransform) -> np.ndarray:
    height, width = pixels.shape
    corners = transform.from_original(np.array([[0, 0], [width, height]]))
    if (
        np.abs(corners - np.rint(corners).clip(0, size)).max() > _EDGE_TOLERANCE_PX
    ):  # the image is not aligned with whole pixels
        low, high = np.rint(transform.to_original(np.array([[0, 0], [size, size]]))).astype(int).tolist()
        return cut(pixels, low, high, size)
    inner_height, inner_width = round(height / transform.y_scale), round(width / transform.x_scale)
    top, left = round(-transform.y_offset / transform.y_scale), round(-transform.x_offset / transform.x_scale)
    shrinking = max(height, width) >= size
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    inner = cv2.resize(pixels, (inner_width, inner_height), interpolation=method)
    if inner.shape == (size, size):
        return inner
    square = np.zeros((size, size), pixels.dtype)
    square[top : top + inner_height, left : left + inner_width] = inner
    return square
