"""JPEG, JPEG 2000, WebP and PNG on 8-bit gray pictures, and the quality that results in a given file size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

CLOSE = 0.01  # tolerance, relative to the target size
_STEPS = 14  # maximum number of bisection steps
_SAMPLE = 256  # number of pictures, spread evenly, on which the quality is chosen


@dataclass(frozen=True)
class StillCodec:
    """One of Pillow's codecs with the settings that make its files smallest.

    Args:
        lowest, highest: range of the quality; a higher quality gives larger files.
        whole: whether qualities are whole numbers.
        setting: Pillow's name for the quality.
        listed: whether Pillow expects a list.
    """

    name: str
    kind: str
    lowest: float
    highest: float
    whole: bool = False
    setting: str = "quality"
    listed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, picture_HW: np.ndarray, quality: float) -> bytes:
        """A whole file of a uint8 picture, headers included."""
        sink = io.BytesIO()
        value = int(quality) if self.whole else quality
        options = {self.setting: [value] if self.listed else value}
        Image.fromarray(picture_HW).save(sink, self.kind, **options, **self.options)
        return sink.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (H, W)."""
        return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


JPEG = StillCodec("JPEG", "JPEG", 1, 100, whole=True, options={"optimize": True})
# A bare codestream. Its quality is the PSNR of each picture in dB.
JPEG_2000 = StillCodec(
    "JPEG 2000",
    "JPEG2000",
    10,
    70,
    setting="quality_layers",
    listed=True,
    options={"no_jp2": True, "irreversible": True, "quality_mode": "dB"},
)
WEBP = StillCodec("WebP", "WEBP", 0, 100, options={"method": 6})
LOSSY = (JPEG, JPEG_2000, WEBP)


@dataclass(frozen=True)
class Coded:
    """Pictures after encoding and decoding at one quality."""

    quality: float
    bytes_per_image: float
    decoded: np.ndarray  # (B, H, W) uint8


def coded_near(codec: StillCodec, pictures_BHW: np.ndarray, target_bytes: float) -> Coded:
    """The pictures at the quality whose mean file size is closest to `target_bytes`."""
    quality = quality_near(codec, pictures_BHW, target_bytes)
    files = [codec.encode(picture, quality) for picture in pictures_BHW]
    return Coded(quality, _mean_length(files), np.stack([codec.decode(data) for data in files]))


def quality_near(codec: StillCodec, pictures_BHW: np.ndarray, target_bytes: float) -> float:
    """The quality for a file size, by bisection; an end of the range if the size cannot be reached."""
    sample = pictures_BHW[:: -(-len(pictures_BHW) // _SAMPLE)]

    def size(quality: float) -> float:
        return _mean_length([codec.encode(picture, quality) for picture in sample])

    low, high = codec.lowest, codec.highest
    tried = {low: size(low), high: size(high)}
    for _ in range(_STEPS):
        middle = (low + high) / 2
        middle = float(int(middle)) if codec.whole else middle
        nearest = min(abs(length - target_bytes) for length in tried.values())
        near_enough = not codec.whole and nearest <= CLOSE * target_bytes
        if middle in tried or near_enough or not tried[low] < target_bytes < tried[high]:
            break
        tried[middle] = size(middle)
        low, high = (middle, high) if tried[middle] < target_bytes else (low, middle)
    return min(tried, key=lambda quality: abs(tried[quality] - target_bytes))


def png_bytes(pictures_BHW: np.ndarray) -> float:
    """Mean length of lossless PNG files."""
    files = []
    for picture in pictures_BHW:
        sink = io.BytesIO()
        Image.fromarray(picture).save(sink, "PNG", optimize=True)
        files.append(sink.getvalue())
    return _mean_length(files)


def _mean_length(files: Sequence[bytes]) -> float:
    return sum(map(len, files)) / len(files)
