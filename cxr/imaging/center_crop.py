"""The largest centered square of an image, as networks take it that were trained on such squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from scipy.ndimage import gaussian_filter1d

from cxr.imaging.geometry import ResizeTransform, cut
from cxr.imaging.image import to_bits

Resampling = Literal["area", "gaussian"]
CENTER = "center"  # value in column `crop_status`


@dataclass(frozen=True)
class CenterCrop:
    """How images are cropped: to their largest centered square, resized by `resampling`; see `CenterSquare.crop`."""

    resampling: Resampling

    def options(self) -> str:
        """The options of `cxr ingest` that crop images in this way."""
        return f"--center-crop {self.resampling}"

    def describe(self) -> dict[str, Any]:
        return {"rule": CENTER, "resampling": self.resampling}

    def loaded(self) -> Callable[[np.ndarray], CenterSquare]:
        """From an original's pixels (H, W) to the square to cut out of them."""
        return partial(center_square, resampling=self.resampling)


@dataclass(frozen=True)
class CenterSquare:
    """A square of whole pixels within an image."""

    x: int
    y: int
    side: int
    resampling: Resampling
    reason: str = ""  # centered squares always exist

    @property
    def status(self) -> str:
        """Value in column `crop_status`."""
        return CENTER

    def transform(self, size: int) -> ResizeTransform:
        """Map from the pixels of `crop(…, size)` to the image that was cropped."""
        scale = self.side / size
        return ResizeTransform(scale, scale, self.x, self.y)

    def crop(self, pixels_HW: np.ndarray, size: int) -> np.ndarray:
        """The square resized to (size, size). area: same dtype, see `geometry.cut`. gaussian: float32 in [0, 1].

        gaussian is `skimage.transform.resize` of gray values between -1 and 1, which is what TorchXRayVision does: a
        Gaussian filter whose standard deviation is (factor - 1) / 2 pixels, and linear interpolation. Beyond the
        border, it sees the mean of black and white.
        """
        end = self.x + self.side, self.y + self.side
        if self.resampling == "area":
            return cut(pixels_HW, (self.x, self.y), end, size)
        square = to_bits(pixels_HW[self.y : end[1], self.x : end[0]], 32) - np.float32(0.5)
        weights = _gaussian_weights(self.side, size)
        return (weights @ square @ weights.T + np.float32(0.5)).clip(0, 1)


def center_square(pixels_HW: np.ndarray, resampling: Resampling) -> CenterSquare:
    """The largest centered square; of two middle positions, the one that is further to the left or top."""
    height, width = pixels_HW.shape
    side = min(height, width)
    return CenterSquare(width // 2 - side // 2, height // 2 - side // 2, side, resampling)


@lru_cache(maxsize=64)
def _gaussian_weights(length: int, size: int) -> np.ndarray:
    """(size, length) float32 matrix that filters and interpolates one axis; outside, the signal is 0."""
    center = (np.arange(size) + 0.5) * length / size - 0.5
    low = np.floor(center).astype(int)
    weights = np.zeros((size, length))
    for index, weight in ((low, low + 1 - center), (low + 1, center - low)):
        inside = (index >= 0) & (index < length)
        weights[np.flatnonzero(inside), index[inside]] += weight[inside]
    if length > size:  # filtering the rows of this matrix is filtering the signal, since the filter is symmetric
        weights = gaussian_filter1d(weights, (length / size - 1) / 2, axis=1, mode="constant", truncate=4.0)
    return weights.astype(np.float32)
