"""The part of an image that an aligner makes the common frame: a square, usually rotated and stretched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.imaging.geometry import ResizeTransform, place

ALIGNED = "aligned"  # value in column `crop_status`


@dataclass(frozen=True)
class AlignedFrame:
    """Where the common frame lies in an image.

    Attributes:
        to_image: from the frame, whose sides have a length of 1, to pixels of the image.
        reason: why the image is to be stored whole; empty if it was aligned.
    """

    to_image: ResizeTransform
    reason: str = ""

    @property
    def status(self) -> str:
        """Value in column `crop_status`."""
        return ALIGNED

    def transform(self, size: int) -> ResizeTransform:
        """Map from the pixels of `crop(…, size)` to the image that was aligned."""
        return ResizeTransform(1 / size, 1 / size).then(self.to_image)

    def crop(self, pixels_HW: np.ndarray, size: int) -> np.ndarray:
        """Resample the frame once from the image's own pixels to (size, size), same dtype; 0 outside the image."""
        return place(pixels_HW, size, self.transform(size))


def aligned_frame(theta_23: np.ndarray, square: ResizeTransform, size: int, reason: str = "") -> AlignedFrame:
    """The frame that an aligner's transform describes, at any resolution.

    Args:
        theta_23: from the common frame to the square that the aligner saw, both from −1 to 1 (`F.affine_grid`).
        square: from the pixels of that square to the image's.
        size: height and width of that square in pixels.
        reason: see `AlignedFrame`.
    """
    theta = ResizeTransform.from_matrix(theta_23)
    return AlignedFrame(from_units(1).inverse().then(theta).then(from_units(size)).then(square), reason)


def from_units(size: int) -> ResizeTransform:
    """From coordinates between −1 and 1, as `F.affine_grid` counts, to the pixels of a square of this size."""
    half = size / 2
    return ResizeTransform(half, half, half, half)
