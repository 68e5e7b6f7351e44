"""Boxes from heat maps: one around each connected region that is hot enough (Wang et al. 2017, ChestX-ray8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from cxr.imaging.geometry import ResizeTransform

Hot = Literal["share", "otsu", "wang"]
FULL = 255  # the heat of 1
WANG = (60, 180)
_COLD = FULL + 1  # a level that nothing reaches


@dataclass(frozen=True)
class BoxRule:
    """What of a map is hot, and which boxes are kept.

    share: cells of at least `share` of the map's own maximum, so that the box of a peak is its width at that part of
    its height; otsu: cells above the threshold that parts the map's values best (Otsu 1979); wang: cells of at least
    60 of 255, and once more those of at least 180, which often gives a box within a box.

    Args:
        least: a map whose maximum, in [0, 1], stays below has no box.
        most: boxes of a map, the best.
        smallest: share of the map that a box must cover.

    Raises:
        ValueError: a value out of its range.
    """

    hot: Hot = "share"
    share: float = 0.5
    least: float = 0.1
    most: int = 3
    smallest: float = 0.0

    def __post_init__(self) -> None:
        if self.hot not in get_args(Hot) or not 0 < self.share <= 1 or not 0 < self.least <= 1:
            raise ValueError(
                f"boxes by {self.hot!r}, share {self.share}, least {self.least}: wanted one of "
                f"{', '.join(get_args(Hot))}, and numbers above 0 up to 1"
            )
        if self.most < 1 or not 0 <= self.smallest < 1:
            raise ValueError(
                f"at most {self.most} boxes, each of at least {self.smallest} of the map: wanted 1 or more boxes, "
                f"and a share below 1"
            )

    def levels(self, maps_MHW: np.ndarray) -> np.ndarray:
        """(M, L) int, heat from which a cell of each map is hot; above 255 where the map stays cold."""
        highest = maps_MHW.max((1, 2), initial=0)[:, None]
        if self.hot == "wang":
            levels = np.tile(WANG, (len(maps_MHW), 1))
        elif self.hot == "otsu":
            levels = np.array([_otsu(one) for one in maps_MHW])[:, None]
        else:
            levels = np.ceil(self.share * highest)
        return np.where(highest >= max(1, self.least * FULL), levels, _COLD).astype(int)


@dataclass(frozen=True)
class MapBoxes:
    """Boxes found in a stack of maps; by map, and of each map the best first."""

    index_N: np.ndarray  # noqa: N815, of the map
    boxes_N4: np.ndarray  # noqa: N815, x_min, y_min, x_max, y_max as shares of the map's width and height, float64
    score_N: np.ndarray  # noqa: N815, mean heat of the hot cells in the box, in [0, 1], float64

    def __len__(self) -> int:
        return len(self.index_N)


def boxes_of(maps_MHW: np.ndarray, rule: BoxRule | None = None) -> MapBoxes:
    """The boxes of a stack of heat maps, uint8 or float in [0, 1], which is rounded to 256 steps.

    The score is a mean rather than the peak, so that of a box within a box the hotter one comes first.
    """
    rule = rule or BoxRule()
    if maps_MHW.dtype != np.uint8:
        maps_MHW = np.rint(maps_MHW * FULL).astype(np.uint8)
    levels = rule.levels(maps_MHW)
    found = [box for level in levels.T for box in _regions(maps_MHW, level, rule.smallest)]
    found = np.array(sorted(set(found), key=lambda box: (box[0], -box[5]))).reshape(-1, 6)
    index = found[:, 0].astype(int)
    kept = np.arange(len(index)) - np.searchsorted(index, index) < rule.most
    height, width = maps_MHW.shape[1:]
    return MapBoxes(index[kept], found[kept, 1:5] / (width, height, width, height), found[kept, 5])


def _regions(
    maps_MHW: np.ndarray, level_M: np.ndarray, smallest: float
) -> Iterator[tuple[int, int, int, int, int, float]]:
    """Map, box in cells and score of each connected region; of all maps at once, as one tall picture with gaps."""
    count, height, width = maps_MHW.shape
    warm = np.flatnonzero(level_M < _COLD)
    if not len(warm):
        return
    hot = np.zeros((len(warm), height + 1, width), np.uint8)
    level = level_M[warm].astype(np.uint8)[:, None, None]
    np.greater_equal(maps_MHW if len(warm) == count else maps_MHW[warm], level, out=hot[:, :height].view(bool))
    outlines, nested = cv2.findContours(hot.reshape(-1, width), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    around_N = np.reshape(nested, (-1, 4))[:, 3] if outlines else ()  # -1, or of a hole the outline it lies in
    for outline, around in zip(outlines, around_N, strict=True):
        left, top, wide, high = cv2.boundingRect(outline)
        if around < 0 and wide * high >= smallest * height * width:
            place, top = divmod(top, height + 1)
            inside = (slice(top, top + high), slice(left, left + wide))
            heat = maps_MHW[warm[place]][inside][hot[place][inside].view(bool)]
            yield int(warm[place]), left, top, left + wide, top + high, float(heat.mean()) / FULL


def _otsu(map_HW: np.ndarray) -> float:
    """The least heat of the upper of two classes."""
    return cv2.threshold(map_HW, 0, FULL, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] + 1


def to_original(boxes_N4: np.ndarray, frame: ResizeTransform, stored_px: int, height: int, width: int) -> np.ndarray:
    """Boxes as shares of the stored square of `stored_px` pixels -> pixels of the original image, within it.

    A box that lies in the padding alone comes out without area.
    """
    corners = frame.to_original(boxes_N4.reshape(-1, 2) * stored_px)
    return corners.clip(0, (width, height)).reshape(-1, 4)
