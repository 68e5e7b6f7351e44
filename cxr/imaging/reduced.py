"""Decode an image no larger than its resized copy needs.

JPEG 2000 contains the image at 1/2, 1/4, … of its resolution, and most of the time of decoding goes into the finest
details, which resizing removes again. JPEG can be decoded at 1/2, 1/4 and 1/8 by a smaller inverse DCT. The resized
pixels differ from those of a full decoding by less than methods of resizing differ from each other, if the reduced
image has at least twice the size that is needed, and if it is aligned with the original: the samples of JPEG 2000 lie
beside the centers of the pixels that they replace (tests/imaging/test_reduced.py).

`decode_in_sizes` is the only place that decides this, for ingesting, scoring and `cxr.load` alike. Lung crops,
alignment, enhancement and everything else that needs the original's pixels decode in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import cv2
import numpy as np

from cxr.imaging import geometry
from cxr.imaging.image import EncodedImage, Image

MIN_OVERSAMPLING = 2  # the reduced image's long side, as a multiple of the size that is needed


def decode_to_fit(encoded: EncodedImage, size: int) -> Image:
    """Decode, and resize by `geometry.fit` to (size, size).

    Raises:
        ImageRejectedError: as `encoded.decode`.
        MemoryError: there is not enough memory at the moment.
    """
    return decode_in_sizes(encoded, [size])[0]


def decode_in_sizes(encoded: EncodedImage, sizes: Sequence[int | None]) -> list[Image]:
    """What `decode_to_fit` makes of an image for each of several sizes, and for None the image at its original size.

    Each resolution is decoded once. All that are smaller than the largest take at most a third of its time together.
    """
    height, width = encoded.height, encoded.width

    @cache
    def decoded(halvings: int) -> Image:
        if not halvings:
            return encoded.decode()
        image = encoded.decode_reduced(halvings)
        if image is None:
            return decoded(0)
        aligned = _aligned(image.pixels, height, width, 1 << halvings, encoded.first_center(halvings))
        return replace(image, pixels=aligned)

    images = []
    for size in sizes:
        image = decoded(_halvings(encoded, size) if size else 0)
        fitted = geometry.fit(image.pixels, size, (height, width))[0] if size else image.pixels
        images.append(replace(image, pixels=fitted))
    return images


def _halvings(encoded: EncodedImage, size: int) -> int:
    """How often the resolution can be halved for a copy of this size."""
    halvings, longest = 0, max(encoded.height, encoded.width)
    while halvings < encoded.max_halvings and longest >> halvings + 1 >= MIN_OVERSAMPLING * size:
        halvings += 1
    return halvings


def _aligned(pixels: np.ndarray, height: int, width: int, step: int, first_center: float) -> np.ndarray:
    """Resample a reduced image, keeping its size, so that it covers the original (height, width) from edge to edge.

    Args:
        step: distance of the pixels' centers in the original.
        first_center: distance of the first pixel's center from the edge of the original.
    """
    scales, offsets = [], []
    for original, reduced in zip((width, height), pixels.shape[::-1], strict=True):
        side = original / reduced  # of a pixel of the result, in pixels of the original
        scales.append(side / step)
        offsets.append((side / 2 - first_center) / step)
    if scales == [1, 1] and offsets == [0, 0]:
        return pixels
    return cv2.warpAffine(
        pixels,
        np.column_stack([np.diag(scales), offsets]),
        pixels.shape[::-1],
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
