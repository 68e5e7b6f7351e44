"""Noise removal, normalization and contrast of decoded X-rays, each optional, before they are resized and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from cxr.errors import UserError
from cxr.imaging.image import to_bits

Denoise = Literal["none", "median", "nlm"]
Normalize = Literal["none", "percentile"]
Equalize = Literal["none", "clahe"]

MEDIAN_PX = 3
NLM_PATCH_PX, NLM_SEARCH_PX = 5, 11  # sides of the compared patches and of the search window
NOISE_FLOOR = 0.5 / 255  # noise below this fraction of the range is not removed
PERCENTILES = 1.0, 99.0
CLAHE_CLIP, CLAHE_TILES = 2.0, 8  # limit relative to a flat histogram; tiles per side


@dataclass(frozen=True)
class Enhancement:
    """Optional processing of each decoded X-ray, in this order, at its original size and before any padding."""

    denoise: Denoise = "none"
    """Noise removal. median: 3 x 3 median filter. nlm: non-local means, adapted to the noise of the image; slow."""
    normalize: Normalize = "none"
    """Normalization. percentile: map the 1st and 99th percentile of the image to black and white."""
    equalize: Equalize = "none"
    """Contrast equalization. clahe: contrast-limited adaptive histogram equalization, with a clip limit of 2 and
    8 x 8 tiles."""

    def __post_init__(self) -> None:
        allowed = {"denoise": Denoise, "normalize": Normalize, "equalize": Equalize}
        for name, literal in allowed.items():
            if getattr(self, name) not in get_args(literal):
                options = ", ".join(get_args(literal))
                raise UserError(f"expected {name} to be one of {options}, got {getattr(self, name)!r}: choose one")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Process uint8 or uint16 pixels (H, W) that use the type's full range."""
        for step in self._steps().values():
            pixels = step(pixels)
        return pixels

    def after_each_step(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The image as decoded and after each step, by the step's name."""
        steps = {"as decoded": pixels}
        for name, step in self._steps().items():
            steps[name] = pixels = step(pixels)
        return steps

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return bool(self.describe())

    def __str__(self) -> str:
        return self.options() or "none"

    def describe(self) -> dict[str, str]:
        """The settings that are not "none"."""
        return {name: value for name, value in asdict(self).items() if value != "none"}

    def options(self) -> str:
        """The settings as command-line options: "--denoise median --equalize clahe"."""
        return " ".join(f"--{name} {value}" for name, value in self.describe().items())

    def _steps(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        known = {"median": median, "nlm": non_local_means, "percentile": percentile_window, "clahe": clahe}
        return {value: known[value] for value in self.describe().values()}


def median(pixels: np.ndarray) -> np.ndarray:
    return cv2.medianBlur(pixels, MEDIAN_PX)


def non_local_means(pixels: np.ndarray) -> np.ndarray:
    """Non-local means (Buades, Coll, Morel 2005) with the image's own noise as bandwidth."""
    strength = noise(pixels)
    if strength < NOISE_FLOOR * np.iinfo(pixels.dtype).max:
        return pixels
    return cv2.fastNlMeansDenoising(
        pixels,
        [strength],
        templateWindowSize=NLM_PATCH_PX,
        searchWindowSize=NLM_SEARCH_PX,
        normType=cv2.NORM_L1,  # OpenCV supports no other norm for 16 bits
    )


def noise(pixels: np.ndarray) -> float:
    """Standard deviation of white noise in gray levels, estimated with Immerkaer's mask (1996)."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(pixels, cv2.CV_32F, mask)
    return float(np.sqrt(np.pi / 2) / 6 * cv2.absdiff(response, np.zeros_like(response)).mean())


def percentile_window(pixels: np.ndarray) -> np.ndarray:
    """Stretch `PERCENTILES` of the pixels to the full range and clip the rest. Unchanged if they are equal."""
    largest = np.iinfo(pixels.dtype).max
    cumulative = np.cumsum(np.bincount(pixels.ravel(), minlength=largest + 1)) / pixels.size
    low, high = (int(np.searchsorted(cumulative, percentile / 100)) for percentile in PERCENTILES)
    if low >= high:
        return pixels
    stretched = np.clip((np.arange(largest + 1) - low) / (high - low), 0, 1)
    return np.rint(stretched * largest).astype(pixels.dtype)[pixels]


def clahe(pixels: np.ndarray) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization (Zuiderveld 1994).

    For 16 bits, the upper 8 bits are equalized and their change is applied to the 16-bit pixels: OpenCV would use
    65,536 bins, for which a tile has too few pixels to make the clip limit meaningful.
    """
    coarse = to_bits(pixels, 8)
    equalized = cv2.createCLAHE(CLAHE_CLIP, (CLAHE_TILES, CLAHE_TILES)).apply(coarse)
    if pixels.dtype == np.uint8:
        return equalized
    change = (equalized.astype(np.int32) - coarse) * 257
    return np.clip(pixels + change, 0, np.iinfo(np.uint16).max).astype(np.uint16)
