"""Resize images of any shape to squares of one size, with the transform that maps coordinates back exactly.

Coordinates have edges at integers: pixel i covers [i, i + 1], x to the right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

_EDGE_TOLERANCE_PX = 1e-6  # a coordinate this close to a pixel's edge lies on it


@dataclass(frozen=True)
class ResizeTransform:
    """Affine map from stored pixels to the original image, both in pixels.

    x_original = x_scale * x + x_skew * y + x_offset, and y_original = y_skew * x + y_scale * y + y_offset. The skews
    are 0 unless an aligner turned the image.
    """

    x_scale: float = 1.0
    y_scale: float = 1.0
    x_offset: float = 0.0
    y_offset: float = 0.0
    x_skew: float = 0.0
    y_skew: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> ResizeTransform:
        """The transform that `as_dict` described. Rows without skews, of earlier versions, have skews of 0."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_matrix(cls, matrix_23: np.ndarray) -> ResizeTransform:
        """The transform with this 2 x 3 matrix, which maps (x, y, 1)."""
        (x_scale, x_skew, x_offset), (y_skew, y_scale, y_offset) = np.asarray(matrix_23, np.float64).tolist()
        return cls(x_scale, y_scale, x_offset, y_offset, x_skew, y_skew)

    @property
    def matrix(self) -> np.ndarray:
        """The 2 x 3 matrix that maps (x, y, 1), float64."""
        return np.array([[self.x_scale, self.x_skew, self.x_offset], [self.y_skew, self.y_scale, self.y_offset]])

    @property
    def steps(self) -> tuple[float, float]:
        """Distance in the original, in pixels, between the centers of stored pixels that are neighbors in a row, and
        in a column."""
        return math.hypot(self.x_scale, self.y_skew), math.hypot(self.x_skew, self.y_scale)

    def to_original(self, points_xy: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the stored square -> float64 points of the original image, both in pixels."""
        return np.asarray(points_xy, np.float64) @ self._linear.T + self._offset

    def from_original(self, points_xy: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the original image -> float64 points of the stored square, both in pixels."""
        return np.linalg.solve(self._linear, (np.asarray(points_xy, np.float64) - self._offset).T).T

    def boxes_to_original(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of the stored square, x_min, y_min, x_max, y_max -> the smallest boxes around them in the
        original."""
        return _around(self.to_original(_corners(boxes_N4)))

    def boxes_from_original(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of the original image -> the smallest boxes around them in the stored square."""
        return _around(self.from_original(_corners(boxes_N4)))

    def then(self, outer: ResizeTransform) -> ResizeTransform:
        """Compose with `outer`, applied second: for example, a crop of a stored square with the square's
        transform."""
        offset = outer._linear @ self._offset + outer._offset
        return ResizeTransform.from_matrix(np.column_stack([outer._linear @ self._linear, offset]))

    def inverse(self) -> ResizeTransform:
        """The map from the original image to stored pixels."""
        offset = -np.linalg.solve(self._linear, self._offset)
        return ResizeTransform.from_matrix(np.column_stack([np.linalg.inv(self._linear), offset]))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @property
    def _linear(self) -> np.ndarray:
        return self.matrix[:, :2]

    @property
    def _offset(self) -> np.ndarray:
        return self.matrix[:, 2]


_FROM_CENTERS = ResizeTransform(x_offset=0.5, y_offset=0.5)  # from coordinates in which pixel centers are whole


def _corners(boxes_N4: np.ndarray) -> np.ndarray:
    """The four corners of each box, (4 N, 2)."""
    return np.asarray(boxes_N4, np.float64)[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)


def _around(corners_xy: np.ndarray) -> np.ndarray:
    """The smallest box around every four points, (N, 4)."""
    corners = corners_xy.reshape(-1, 4, 2)
    return np.concatenate([corners.min(1), corners.max(1)], 1)


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
    return place(pixels, size, transform.then(to_copy)), transform


def fitted_transform(height: int, width: int, size: int) -> ResizeTransform:
    """The transform of `fit` for an image of this height and width."""
    longest = max(height, width)
    inner_height, inner_width = (max(1, round(side * size / longest)) for side in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    x_scale, y_scale = width / inner_width, height / inner_height
    return ResizeTransform(x_scale, y_scale, -left * x_scale, -top * y_scale)


def fit_mask(mask: np.ndarray, size: int, transform: ResizeTransform) -> np.ndarray:
    """Resize a bool mask (H, W) like its image by `place`; true where at least half of a pixel is covered."""
    return place(mask.astype(np.uint8) * np.uint8(255), size, transform) >= 128


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
    edges = [columns[0] - 1, rows[0] - 1, columns[-1] + 2, rows[-1] + 2]
    (box,) = transform.boxes_to_original(np.array([edges])).clip(0, (width, height, width, height))
    x0, y0 = np.floor(box[:2]).astype(int).tolist()
    x1, y1 = np.ceil(box[2:]).astype(int).tolist()
    if x1 > x0 and y1 > y0:
        of_box = transform.then(ResizeTransform(x_offset=-x0, y_offset=-y0))
        original[y0:y1, x0:x1] = map_to_original(mask, of_box, y1 - y0, x1 - x0) >= 0.5
    return original


def map_to_original(values: np.ndarray, transform: ResizeTransform, height: int, width: int) -> np.ndarray:
    """Map values of stored pixels (H, W) to their original: float32 (height, width).

    Interpolated linearly between pixel centers; 0 outside the stored pixels. The padding added by `fit` has no
    influence.
    """
    own_height, own_width = values.shape
    square, whole = np.array([[0, 0, own_width, own_height]]), np.array([[0, 0, width, height]])
    covered = _whole_pixels(transform.boxes_to_original(square), whole)  # the part of the original around the values
    inner = _whole_pixels(transform.boxes_from_original(whole), square)  # the part of the values without padding
    (x0, y0, x1, y1), (left, top, right, bottom) = covered, inner
    result = np.zeros((height, width), np.float32)
    if x1 > x0 and y1 > y0 and right > left and bottom > top:
        to_inner = transform.inverse().then(ResizeTransform(x_offset=-left, y_offset=-top))
        from_covered = ResizeTransform(x_offset=x0, y_offset=y0).then(to_inner)
        part = cv2.warpAffine(
            values[top:bottom, left:right].astype(np.float32),
            _between_centers(from_covered),
            (x1 - x0, y1 - y0),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if transform.x_skew or transform.y_skew:  # the values do not fill the box around them
            part[_outside(from_covered, part.shape, (right - left, bottom - top))] = 0
        result[y0:y1, x0:x1] = part
    return result


def _whole_pixels(box_14: np.ndarray, limits_14: np.ndarray) -> list[int]:
    return np.rint(box_14.clip(limits_14[:, [0, 1, 0, 1]], limits_14[:, [2, 3, 2, 3]]))[0].astype(int).tolist()


def _between_centers(transform: ResizeTransform) -> np.ndarray:
    """The matrix of a transform for coordinates in which the centers of pixels are whole, as OpenCV counts."""
    return _FROM_CENTERS.then(transform).then(_FROM_CENTERS.inverse()).matrix


def _outside(transform: ResizeTransform, shape: tuple[int, ...], size_xy: tuple[int, int]) -> np.ndarray:
    """Bool (shape): pixels whose centers `transform` maps out of the rectangle from (0, 0) to `size_xy`."""
    height, width = shape
    matrix = _FROM_CENTERS.then(transform).matrix.astype(np.float32)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    outside = np.zeros(shape, bool)
    for (by_x, by_y, offset), size in zip(matrix, size_xy, strict=True):
        mapped = by_x * x + by_y * y + offset
        outside |= (mapped < 0) | (mapped > size)
    return outside


def place(pixels: np.ndarray, size: int, transform: ResizeTransform) -> np.ndarray:
    """Resample (H, W) pixels once, to the (size, size) pixels that `transform` maps to them; same dtype, 0 outside.

    Pixels are averaged by area when shrunk and interpolated linearly when enlarged; cubically where `transform` turns
    the image or its edges lie within pixels, since linear interpolation between these would blur.
    """
    height, width = pixels.shape
    upright = not (transform.x_skew or transform.y_skew)
    (image,) = transform.boxes_from_original(np.array([[0, 0, width, height]]))
    if upright and np.abs(image - np.rint(image).clip(0, size)).max() <= _EDGE_TOLERANCE_PX:
        return _padded(pixels, size, np.rint(image).astype(int).tolist())
    (square,) = transform.boxes_to_original(np.array([[0, 0, size, size]]))
    if upright and np.abs(square - np.rint(square)).max() <= _EDGE_TOLERANCE_PX:
        low_x, low_y, high_x, high_y = np.rint(square).astype(int).tolist()
        return cut(pixels, (low_x, low_y), (high_x, high_y), size)
    return _warped(pixels, size, transform)


def _padded(pixels: np.ndarray, size: int, box: Sequence[int]) -> np.ndarray:
    """Pixels resized to a box of whole pixels within a black square."""
    left, top, right, bottom = box
    method = cv2.INTER_AREA if max(pixels.shape) >= size else cv2.INTER_LINEAR
    inner = cv2.resize(pixels, (right - left, bottom - top), interpolation=method)
    if inner.shape == (size, size):
        return inner
    square = np.zeros((size, size), pixels.dtype)
    square[top:bottom, left:right] = inner
    return square


def _warped(pixels: np.ndarray, size: int, transform: ResizeTransform) -> np.ndarray:
    """`place` for any transform: each pixel is the mean of samples that are at most one original pixel apart.

    Samples are cubic: linear ones lose a third of the gradients' energy at the original's resolution.
    """
    count = max(1, math.ceil(max(transform.steps) - _EDGE_TOLERANCE_PX))
    samples = cv2.warpAffine(
        pixels,
        _between_centers(ResizeTransform(1 / count, 1 / count).then(transform)),
        (count * size, count * size),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
    )
    return cv2.resize(samples, (size, size), interpolation=cv2.INTER_AREA) if count > 1 else samples
