"""The canvas on which a phantom is drawn: canonical coordinates, poses, drawing primitives.

There are two coordinate frames. *Canonical*: x to the right, y down, both in [−1, 1] over the image of a chest in
neutral pose (as in `affine_grid`, edges at ±1). *Pixels*: image pixels, centers at integers. A pose is the 2 x 3
affine transform from canonical to image coordinates. Everything is drawn in the final pose, so nothing is resampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Layer = NDArray[Any]  # (size, size) float32
Mask = NDArray[np.bool_]  # (size, size)
Points = NDArray[np.float64]  # (N, 2) canonical x, y

IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
_SHIFT = 4  # OpenCV takes sub-pixel points as integers with this many fractional bits
_REACH = 1.7  # textures cover [−_REACH, _REACH] in canonical coordinates


class Canvas:
    """Drawing on a `size` x `size` image under `pose_unit` (2 x 3, canonical to image).

    Attributes: `x`, `y`, the canonical coordinates of each pixel's center; `px_per_unit`, the number of pixels per
    canonical unit (mean over directions).
    """

    def __init__(self, size: int, pose_unit: ArrayLike = IDENTITY) -> None:
        self.size = size
        self.pose_unit = np.asarray(pose_unit, np.float64).reshape(2, 3)
        matrix, shift = self.pose_unit[:, :2], self.pose_unit[:, 2]
        self.px_per_unit = size / 2 * float(np.sqrt(abs(np.linalg.det(matrix))))
        back = np.linalg.inv(matrix)
        self._back = np.column_stack([back, -back @ shift])
        axis = (np.arange(size) + 0.5) * 2 / size - 1
        self.x, self.y = (
            (row[0] * axis[None, :] + (row[1] * axis + row[2])[:, None]).astype(np.float32) for row in self._back
        )

    @cached_property
    def coarser(self) -> Canvas:
        """The same view at half the size, for content without sharp edges; see `enlarged`."""
        return Canvas(-(-self.size // 2), self.pose_unit)

    def enlarged(self, layer: Layer) -> Layer:
        """A coarser layer at this canvas's size."""
        if len(layer) == self.size:
            return layer
        return cv2.resize(layer, (self.size, self.size), interpolation=cv2.INTER_LINEAR)

    def to_px(self, points: Points) -> Points:
        """Canonical points -> pixel coordinates, centers at integers."""
        unit = points @ self.pose_unit[:, :2].T + self.pose_unit[:, 2]
        return (unit + 1) * self.size / 2 - 0.5

    def px_at(self, point: ArrayLike) -> tuple[int, int]:
        """Row and column of the pixel at a canonical point, clipped to the image."""
        column, row = np.clip(np.rint(self.to_px(np.atleast_2d(point))[0]), 0, self.size - 1)
        return int(row), int(column)

    def fill(self, outlines: Iterable[Points]) -> Layer:
        """Filled outlines, a sequence or (N, K, 2): 1 inside, smooth at the edge; overlaps count once."""
        layer = np.zeros((self.size, self.size), np.uint8)
        for outline in self._all_fixed(outlines):
            cv2.fillPoly(layer, [outline], 255, cv2.LINE_AA, _SHIFT)
        return layer.astype(np.float32) * np.float32(1 / 255)

    def inside(self, outline: Points) -> Mask:
        """Whether each pixel is inside an outline."""
        layer = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(layer, [self._fixed(outline)], 1, cv2.LINE_8, _SHIFT)
        return layer.astype(bool)

    def trace(self, lines: Iterable[Points], width: float) -> Layer:
        """Open lines of a canonical `width`: 1 on the line, fainter if it is thinner than a pixel."""
        layer = np.zeros((self.size, self.size), np.uint8)
        self.trace_on(layer, lines, width, 1.0)
        return layer.astype(np.float32) * np.float32(1 / 255)

    def trace_on(self, layer: NDArray[np.uint8], lines: Iterable[Points], width: float, value: float) -> None:
        """Draw open lines, a sequence or an (N, K, 2) array, over a uint8 layer; `value` in [0, 1]."""
        px = width * self.px_per_unit
        thickness = max(1, round(px))
        ink = int(255 * value * min(1.0, px / thickness))
        cv2.polylines(layer, self._all_fixed(lines), False, ink, thickness, cv2.LINE_AA, _SHIFT)

    def depth(self, shape: Mask | Layer) -> Layer:
        """Canonical distance of each pixel of `shape` to the edge of the shape; 0 outside."""
        inside = (shape > 0.5).astype(np.uint8)
        return cv2.distanceTransform(inside, cv2.DIST_L2, 5) * np.float32(1 / self.px_per_unit)

    def solid(self, shape: Mask | Layer, radius: float) -> Layer:
        """Thickness of a rounded body with the projection `shape`: 0 at its edge, 1 from `radius` inwards."""
        return rounded(self.depth(shape), radius)

    def blur(self, layer: Layer, radius: float) -> Layer:
        """Gaussian blur with a canonical standard deviation."""
        return blur(layer, radius * self.px_per_unit)

    def texture(self, rng: np.random.Generator, grain: float) -> Layer:
        """Smooth noise with mean 0, standard deviation about 1 and a canonical grain size; it moves with the pose."""
        cells = int(np.ceil(2 * _REACH / grain))
        noise = rng.standard_normal((cells, cells), np.float32)
        per_unit = cells / (2 * _REACH)
        shrink = int(np.clip(grain * self.px_per_unit / 5, 1, 8))
        size = -(-self.size // shrink)
        px_to_image = np.array([[2 / size, 0, 1 / size - 1], [0, 2 / size, 1 / size - 1], [0, 0, 1]])
        cell = np.array([[per_unit, 0, cells / 2 - 0.5], [0, per_unit, cells / 2 - 0.5], [0, 0, 1]])
        warp = (cell @ np.vstack([self._back, [0, 0, 1]]) @ px_to_image)[:2]
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        sheet = cv2.warpAffine(noise, warp, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT)
        return self.enlarged(sheet * np.float32(1.35))  # interpolation has reduced the standard deviation

    def bump(self, center: ArrayLike, radii: ArrayLike, power: float = 1.0) -> Layer:
        """A soft ellipse: exp(−r^(2·power)), where r is 0 at the center and 1 at `radii`."""
        (cx, cy), (rx, ry) = np.asarray(center, np.float32), np.asarray(radii, np.float32)
        distance = ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2
        return np.exp(-(distance if power == 1.0 else distance**power))

    def _all_fixed(self, points: Iterable[Points]) -> list[NDArray[np.int32]]:
        return list(self._fixed(points) if isinstance(points, np.ndarray) else map(self._fixed, points))

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        return np.rint(self.to_px(points) * (1 << _SHIFT)).astype(np.int32)


def rounded(depth: Layer, radius: float) -> Layer:
    """Thickness of a body whose edge is a quarter circle: 0 at depth 0, 1 from `radius` inwards."""
    fraction = np.minimum(depth, np.float32(radius)) / np.float32(radius)  # depth can be the largest float
    fraction *= 2 - fraction
    return np.sqrt(fraction, out=fraction)


def blur(layer: Layer, sigma_px: float) -> Layer:
    """Gaussian blur with a standard deviation in pixels; wide blurs run on a downsampled copy."""
    if sigma_px < 0.2:
        return layer
    shrink = int(np.clip(sigma_px / 2, 1, 16))
    if shrink == 1:
        return cv2.GaussianBlur(layer, (0, 0), sigma_px, borderType=cv2.BORDER_REPLICATE)
    size = len(layer)
    low_size = -(-size // shrink)
    low = cv2.resize(layer, (low_size, low_size), interpolation=cv2.INTER_AREA)
    low = cv2.GaussianBlur(low, (0, 0), sigma_px * low_size / size, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(low, (size, size), interpolation=cv2.INTER_CUBIC)


def closed_curve(points: ArrayLike, steps: int = 10) -> Points:
    """A smooth closed outline through `points` (Catmull–Rom spline) with `steps` points per segment."""
    p1 = np.asarray(points, np.float64)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (p0, p1, p2, p3))
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.reshape(-1, 2)


def open_curve(points: ArrayLike, steps: int = 10) -> Points:
    """A smooth line through `points`, including the ends."""
    points = np.asarray(points, np.float64)
    ends = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    return closed_curve(ends, steps)[steps : (len(points)) * steps + 1]


def strip(line: Points, half_width: ArrayLike) -> Points:
    """The outline of a band around a line; `half_width` is a number or one per point."""
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-12
    across = np.column_stack([-along[:, 1], along[:, 0]]) * np.broadcast_to(half_width, len(line))[:, None]
    return np.vstack([line + across, (line - across)[::-1]])


def disc(center: ArrayLike, radius: ArrayLike, wobble: ArrayLike = (), points: int = 48) -> Points:
    """A circle or ellipse; `wobble` (harmonics, 2) has the cosine and sine amplitudes that roughen it."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    swell = np.ones(points)
    for order, (cosine, sine) in enumerate(np.asarray(wobble, np.float64).reshape(-1, 2), start=2):
        swell += cosine * np.cos(order * angle) + sine * np.sin(order * angle)
    return np.asarray(center) + np.column_stack([np.cos(angle), np.sin(angle)]) * swell[:, None] * np.asarray(radius)
