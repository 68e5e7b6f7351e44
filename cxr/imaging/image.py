"""What a decoded X-ray is, whatever its file's format, and what is refused as none."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cxr.errors import Refused

MIN_SIDE_PX = 16
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; the largest films scanned have about 25 million

_COLOURFUL = 0.15  # difference of a pixel's channels, as a part of full range, from which the eye sees colour
_COLOURED_SHARE = 0.05  # arrows and letters drawn on an X-ray stay below


@dataclass(frozen=True)
class Image:
    """One X-ray. `pixels` (H, W), uint8 or uint16, use the type's full range; dense tissue is bright.

    `spacing_mm` is the distance of pixel centres (between rows, between columns), `view` is DICOM's View
    Position ("PA", "AP", "LL", …, PS3.3 C.8.1.2). Both are None where the file has none.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    view: str | None = None


def to_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Full-range pixels as uint8 (`bits` 8) or uint16 (16). 255 and 65,535 become one another."""
    assert bits in (8, 16)
    assert pixels.dtype in (np.uint8, np.uint16)
    if pixels.dtype.itemsize * 8 == bits:
        return pixels
    if bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return cv2.convertScaleAbs(pixels, alpha=1 / 257)


def check_size(height_px: int, width_px: int) -> None:
    """Refuse, before anything is decoded, what is no picture or would fill the memory."""
    size = f"{width_px} x {height_px} pixels"
    if min(height_px, width_px) <= 0:
        raise Refused(f"zero size: the header says {size}")
    if min(height_px, width_px) < MIN_SIDE_PX:
        raise Refused(f"too small: {size}, at least {MIN_SIDE_PX} x {MIN_SIDE_PX} are needed")
    if height_px * width_px > MAX_PIXELS:
        raise Refused(f"too large: the header says {size}, at most {MAX_PIXELS // 10**6} million are decoded")


def check_not_blank(pixels: np.ndarray) -> None:
    low, high, _, _ = cv2.minMaxLoc(pixels)
    if low == high:
        raise Refused("blank image: all pixels are equal")


def to_gray(pixels_HWC: np.ndarray) -> np.ndarray:
    """Luminance of BGR or BGRA pixels (alpha ignored); exactly the one channel where all three are equal.

    Raises:
        Refused: a colour photograph or overlay.
    """
    step = max(1, min(pixels_HWC.shape[:2]) // 256)
    sample = np.ascontiguousarray(pixels_HWC[::step, ::step, :3]).astype(np.float32)
    sample /= np.iinfo(pixels_HWC.dtype).max
    share = float((np.ptp(sample, axis=2) > _COLOURFUL).mean())
    if share > _COLOURED_SHARE:
        raise Refused(f"colour image: {share:.0%} of its pixels are coloured, an X-ray is gray")
    return cv2.cvtColor(np.ascontiguousarray(pixels_HWC[..., :3]), cv2.COLOR_BGR2GRAY)
