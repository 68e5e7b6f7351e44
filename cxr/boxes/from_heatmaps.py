"""Boxes from heat maps: one around each connected region above a threshold (Wang et al. 2017, ChestX-ray8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from cxr.imaging.geometry import ResizeTransform

ThresholdMode = Literal["fraction", "otsu", "wang"]
FULL = 255  # the uint8 value of heat 1
WANG = (60, 180)
_UNREACHABLE = FULL + 1  # threshold of maps without a box


@dataclass(frozen=True)
class BoxRule:
    """How heat maps are thresholded, and which of the resulting boxes are kept.

    Modes: fraction: cells of at least `threshold` times the map's own maximum, so that the box of a peak is as wide
    as the peak at that fraction of its height. otsu: cells above the map's Otsu threshold (Otsu 1979). wang: cells of
    at least 60 of 255 and, separately, cells of at least 180, which often gives a box within a box.

    Args:
        min_peak: a map whose maximum, in [0, 1], is lower has no box.
        max_boxes: maximum number of boxes per map; those with the highest scores are kept.
        min_area: minimum area of a box, as a fraction of the map.

    Raises:
        ValueError: a value is out of range.
    """

    mode: ThresholdMode = "fraction"
    threshold: float = 0.5
    min_peak: float = 0.1
    max_boxes: int = 3
    min_area: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(ThresholdMode):
            raise ValueError(
                f"expected mode to be one of {', '.join(get_args(ThresholdMode))}, got {self.mode!r}: choose one"
            )
        if not 0 < self.threshold <= 1 or not 0 < self.min_peak <= 1:
            raise ValueError(
                f"expected threshold and min_peak above 0 and up to 1, got {self.threshold} and {self.min_peak}"
            )
        if self.max_boxes < 1 or not 0 <= self.min_area < 1:
            raise ValueError(
                f"expected max_boxes >= 1 and 0 <= min_area < 1, got {self.max_boxes} and {self.min_area}"
            )

    def levels(self, maps_MHW: np.ndarray, threshold_M: np.ndarray | None = None) -> np.ndarray:
        """(M, L) int thresholds: a cell is hot from this value on; above 255 for maps below `min_peak`.

        Args:
            threshold_M: for mode fraction, each map's own threshold instead of `threshold`.
        """
        highest = maps_MHW.max((1, 2), initial=0)[:, None]
        if self.mode == "wang":
            levels = np.tile(WANG, (len(maps_MHW), 1))
        elif self.mode == "otsu":
            levels = np.array([_otsu(map_HW) for map_HW in maps_MHW])[:, None]
        else:
            levels = np.ceil((self.threshold if threshold_M is None else threshold_M[:, None]) * highest)
        return np.where(highest >= max(1, self.min_peak * FULL), levels, _UNREACHABLE).astype(int)


@dataclass(frozen=True)
class MapBoxes:
    """Boxes of a stack of maps, sorted by map and then by descending score."""

    index_N: np.ndarray  # noqa: N815, index of the map
    boxes_N4: np.ndarray  # noqa: N815, x_min, y_min, x_max, y_max as fractions of the map's width and height, float64
    score_N: np.ndarray  # noqa: N815, mean heat of the hot cells in the box, in [0, 1], float64

    def __len__(self) -> int:
        return len(self.index_N)


def boxes_of(maps_MHW: np.ndarray, rule: BoxRule | None = None, threshold_M: np.ndarray | None = None) -> MapBoxes:
    """The boxes of a stack of heat maps, uint8 or float in [0, 1], which are rounded to 256 levels.

    The score is a mean rather than the peak, so that the hotter one of two nested boxes comes first.

    Args:
        threshold_M: see `BoxRule.levels`.
    """
    rule = rule or BoxRule()
    if maps_MHW.dtype != np.uint8:
        maps_MHW = np.rint(maps_MHW * FULL).astype(np.uint8)
    levels = rule.levels(maps_MHW, threshold_M)
    boxes = [box for level in levels.T for box in _regions(maps_MHW, level, rule.min_area)]
    boxes = np.array(sorted(set(boxes), key=lambda box: (box[0], -box[5]))).reshape(-1, 6)
    index = boxes[:, 0].astype(int)
    keep = np.arange(len(index)) - np.searchsorted(index, index) < rule.max_boxes
    height, width = maps_MHW.shape[1:]
    return MapBoxes(index[keep], boxes[keep, 1:5] / (width, height, width, height), boxes[keep, 5])


def _regions(
    maps_MHW: np.ndarray, level_M: np.ndarray, min_area: float
) -> Iterator[tuple[int, int, int, int, int, float]]:
    """Map, box in cells and score of each connected region; maps are stacked into one tall image with gaps."""
    count, height, width = maps_MHW.shape
    above = np.flatnonzero(level_M < _UNREACHABLE)
    if not len(above):
        return
    hot = np.zeros((len(above), height + 1, width), np.uint8)
    level = level_M[above].astype(np.uint8)[:, None, None]
    np.greater_equal(maps_MHW if len(above) == count else maps_MHW[above], level, out=hot[:, :height].view(bool))
    outlines, nested = cv2.findContours(hot.reshape(-1, width), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parent_N = np.reshape(nested, (-1, 4))[:, 3] if outlines else ()  # -1, or for a hole its outer contour
    for outline, parent in zip(outlines, parent_N, strict=True):
        left, top, wide, high = cv2.boundingRect(outline)
        if parent < 0 and wide * high >= min_area * height * width:
            row, top = divmod(top, height + 1)
            inside = (slice(top, top + high), slice(left, left + wide))
            heat = maps_MHW[above[row]][inside][hot[row][inside].view(bool)]
            yield int(above[row]), left, top, left + wide, top + high, float(heat.mean()) / FULL


def _otsu(map_HW: np.ndarray) -> float:
    """The lowest value of the upper of Otsu's two classes."""
    return cv2.threshold(map_HW, 0, FULL, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] + 1


def to_original(boxes_N4: np.ndarray, frame: ResizeTransform, stored_px: int, height: int, width: int) -> np.ndarray:
    """Boxes as fractions of the stored square of `stored_px` pixels -> pixels of the original, clipped to the image.

    A box that lies entirely in the padding gets zero area.
    """
    return frame.boxes_to_original(boxes_N4 * stored_px).clip(0, (width, height, width, height))
