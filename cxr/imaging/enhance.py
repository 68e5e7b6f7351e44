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
NLM_PATCH_PX, NLM_SEARCH_PX = 5, 11  # sides of what is compared, and of where it is sought
QUIET = 0.5 / 255  # noise, as a share of the range, below which there is none to remove
PERCENTILES = 1.0, 99.0
CLAHE_CLIP, CLAHE_TILES = 2.0, 8  # times a flat histogram; tiles a side


@dataclass(frozen=True)
class Enhancement:
    """What is done to an X-ray as it was decoded, in this order; calling it gives pixels of the same shape and type.

    It is done at the original's size, so that a border added later has no influence, and sees one image alone.
    """

    denoise: Denoise = "none"
    """Noise removal: the median of 3 x 3 pixels; or non-local means, as strong as the image is noisy, and slow."""
    normalize: Normalize = "none"
    """Percentile: black and white are the 1st and 99th percentile of the image's own pixels."""
    equalize: Equalize = "none"
    """Contrast within parts of the image: CLAHE, with a limit of 2 and 8 x 8 tiles."""

    def __post_init__(self) -> None:
        wanted = {"denoise": Denoise, "normalize": Normalize, "equalize": Equalize}
        for name, literal in wanted.items():
            if getattr(self, name) not in get_args(literal):
                raise UserError(f"{name}={getattr(self, name)!r}: wanted one of {', '.join(get_args(literal))}")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 or uint16 (H, W), the type's full range."""
        for step in self._steps().values():
            pixels = step(pixels)
        return pixels

    def shown(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The image as decoded and after each step, by name."""
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
        """What is done, without what is not."""
        return {name: value for name, value in asdict(self).items() if value != "none"}

    def options(self) -> str:
        """As jobs take it: "--denoise median --equalize clahe"."""
        return " ".join(f"--{name} {value}" for name, value in self.describe().items())

    def _steps(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        known = {"median": median, "nlm": non_local_means, "percentile": percentile_window, "clahe": clahe}
        return {value: known[value] for value in self.describe().values()}


def median(pixels: np.ndarray) -> np.ndarray:
    return cv2.medianBlur(pixels, MEDIAN_PX)


def non_local_means(pixels: np.ndarray) -> np.ndarray:
    """Means of like patches (Buades, Coll, Morel 2005), with a bandwidth of the image's own noise."""
    strength = noise(pixels)
    if strength < QUIET * np.iinfo(pixels.dtype).max:
        return pixels
    return cv2.fastNlMeansDenoising(
        pixels,
        [strength],
        templateWindowSize=NLM_PATCH_PX,
        searchWindowSize=NLM_SEARCH_PX,
        normType=cv2.NORM_L1,  # the only one that there is for 16 bits
    )


def noise(pixels: np.ndarray) -> float:
    """Standard deviation of white noise in gray levels, by Immerkaer's mask (1996)."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(pixels, cv2.CV_32F, mask)
    return float(np.sqrt(np.pi / 2) / 6 * cv2.absdiff(response, np.zeros_like(response)).mean())


def percentile_window(pixels: np.ndarray) -> np.ndarray:
    """Full range from `PERCENTILES` of the pixels; what lies beyond is clipped. Unchanged where they are equal."""
    most = np.iinfo(pixels.dtype).max
    share = np.cumsum(np.bincount(pixels.ravel(), minlength=most + 1)) / pixels.size
    low, high = (int(np.searchsorted(share, percentile / 100)) for percentile in PERCENTILES)
    if low >= high:
        return pixels
    shown = np.clip((np.arange(most + 1) - low) / (high - low), 0, 1)
    return np.rint(shown * most).astype(pixels.dtype)[pixels]


def clahe(pixels: np.ndarray) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization (Zuiderveld 1994).

    Of 16 bits the upper 8 are equalized and the rest goes along: OpenCV counts 65,536 gray levels there, of which a
    tile has too few pixels for its limit to mean anything.
    """
    coarse = to_bits(pixels, 8)
    equal = cv2.createCLAHE(CLAHE_CLIP, (CLAHE_TILES, CLAHE_TILES)).apply(coarse)
    if pixels.dtype == np.uint8:
        return equal
    moved = (equal.astype(np.int32) - coarse) * 257
    return np.clip(pixels + moved, 0, np.iinfo(np.uint16).max).astype(np.uint16)
