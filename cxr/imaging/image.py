"""Decoded X-rays, whatever their file format, and the limits that are checked before decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from cxr.errors import ImageRejectedError

MIN_SIDE_PX = 16
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; the largest scanned films have about 25 million
MAX_FILE_BYTES = 256 << 20  # an uncompressed image of MAX_PIXELS with 16 bits takes 191 MiB
MAX_DECODING_BYTES = 768 << 20  # leaves room in 1 GiB for the file itself

# X-rays have fewer than 100 pixels per encoded byte. JPEG needs at least one bit per block of 64 pixels, so it cannot
# exceed 512. JPEG-LS and JPEG 2000 encode a black image of any size in a few bytes: up to the size of the largest
# films (BLANK_PIXELS), that may be legitimate and is cheap to decode.
MAX_PIXELS_PER_BYTE = 1000
BLANK_PIXELS = 32_000_000

_COLORFUL = 0.15  # visible difference between a pixel's channels, as a fraction of the full range
_COLOR_SAMPLE_PX = 256 * 256  # about this many pixels are examined
_COLORED_SHARE = 0.05  # arrows and letters on an X-ray stay below this


@dataclass(frozen=True)
class Image:
    """One X-ray. `pixels` (H, W), uint8 or uint16, use the type's full range; dense tissue is bright.

    `spacing_mm` is the distance between pixel centers (between rows, between columns). `view`, `body_part` and
    `modality` are codes from `imaging.dicom_terms`; `sex` is F, M or O; the ids are UIDs of DICOM. All of these are
    None if the file does not contain them.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    view: str | None = None
    body_part: str | None = None
    modality: str | None = None
    study_id: str | None = None
    series_id: str | None = None
    sex: str | None = None
    age_years: float | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header has been checked, but whose pixels have not been decoded."""

    height: int
    width: int
    memory_bytes: int  # estimated peak memory of `decode`, without the file's own bytes
    decode: Callable[[], Image]
    max_halvings: int = 0  # how often the resolution may be halved on decoding, see `imaging.reduced`
    decode_reduced: Callable[[int], Image | None] = lambda halvings: None
    """Decode with sides divided by 2 ** halvings and rounded up; None: only `decode` gives the pixels."""
    first_center: Callable[[int], float] = lambda halvings: (1 << halvings) / 2
    """Where the center of the reduced image's first pixel lies in the original, in pixels from the edge."""


def to_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Convert full-range pixels to uint8 (`bits` 8), uint16 (16) or float32 (32).

    255, 65,535 and 1.0 correspond to each other.
    """
    assert bits in (8, 16, 32)
    assert pixels.dtype in (np.uint8, np.uint16, np.float32)
    if pixels.dtype.itemsize * 8 == bits:
        return pixels
    if bits == 32:
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    if pixels.dtype == np.float32:
        return np.rint(pixels * np.float32(2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    if bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return cv2.convertScaleAbs(pixels, alpha=1 / 257)


def full_range(pixels: np.ndarray) -> np.ndarray:
    """Shift 16-bit samples that use only lower bits, as in exports of 10–14-bit X-rays, to the full range."""
    if pixels.dtype != np.uint16:
        return pixels
    return pixels << (16 - max(8, int(pixels.max(initial=0)).bit_length()))


def check_size(height_px: int, width_px: int) -> None:
    """Reject an image that is empty, or smaller or larger than any X-ray, before it is decoded."""
    size = f"{width_px} x {height_px} pixels"
    if min(height_px, width_px) <= 0:
        raise ImageRejectedError(f"zero size: the header declares {size}")
    if min(height_px, width_px) < MIN_SIDE_PX:
        raise ImageRejectedError(f"too small: expected at least {MIN_SIDE_PX} x {MIN_SIDE_PX} pixels, got {size}")
    if height_px * width_px > MAX_PIXELS:
        raise ImageRejectedError(f"too large: expected at most {MAX_PIXELS // 10**6} million pixels, got {size}")


def check_file_bytes(file_bytes: int) -> None:
    """Reject a file that is too large to read."""
    if file_bytes > MAX_FILE_BYTES:
        raise ImageRejectedError(
            f"too large: expected a file of at most {_mib(MAX_FILE_BYTES)}, got {_mib(file_bytes)}"
        )


def check_decoding_bytes(memory_bytes: int) -> None:
    """Reject an image that would take too much memory to decode."""
    if memory_bytes > MAX_DECODING_BYTES:
        limit, needed = _mib(MAX_DECODING_BYTES), _mib(memory_bytes)
        raise ImageRejectedError(f"too large: expected an image that needs at most {limit} to decode, got {needed}")


def check_ratio(pixels: int, encoded_bytes: int, exempt_pixels: int = 0) -> None:
    """Reject an image of more than `exempt_pixels` that declares more pixels than its encoded bytes can contain."""
    if pixels > max(exempt_pixels, MAX_PIXELS_PER_BYTE * encoded_bytes):
        raise ImageRejectedError(
            f"decompression bomb: expected at most {MAX_PIXELS_PER_BYTE:,} pixels per encoded byte, "
            f"got {pixels:,} pixels from {encoded_bytes:,} bytes"
        )


def require_memory(memory_bytes: int) -> None:
    """Fail early if decoding would run out of memory: codecs would abort, or report a damaged file.

    Raises:
        MemoryError: `memory_bytes` cannot be allocated at the moment.
    """
    np.empty(memory_bytes, np.uint8)


def check_not_blank(pixels: np.ndarray) -> None:
    low, high, _, _ = cv2.minMaxLoc(pixels)
    if low == high:
        raise ImageRejectedError("blank image: all pixels are equal")


def to_gray(pixels_HWC: np.ndarray) -> np.ndarray:
    """Luminance of BGR or BGRA pixels (alpha ignored); exact where all three channels are equal.

    Raises:
        ImageRejectedError: the image is a color photograph or has a color overlay.
    """
    height, width = pixels_HWC.shape[:2]
    step = max(1, math.isqrt(height * width // _COLOR_SAMPLE_PX))
    sample = np.ascontiguousarray(pixels_HWC[::step, ::step, :3]).astype(np.float32)
    sample /= np.iinfo(pixels_HWC.dtype).max
    colored = float((np.ptp(sample, axis=2) > _COLORFUL).mean())
    if colored > _COLORED_SHARE:
        raise ImageRejectedError(f"color image: expected a grayscale X-ray, got {colored:.0%} colored pixels")
    return cv2.cvtColor(np.ascontiguousarray(pixels_HWC[..., :3]), cv2.COLOR_BGR2GRAY)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
