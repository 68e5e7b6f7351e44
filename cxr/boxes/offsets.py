"""Offsets between boxes, as in R-CNN's box regression (Girshick et al. 2014, appendix C).

An offset is (dx, dy, dw, dh): the translation of the center in widths and heights of the box, and the logarithms of
the ratios of widths and heights.
"""

from __future__ import annotations

import numpy as np


def offsets(boxes_N4: np.ndarray, targets_N4: np.ndarray) -> np.ndarray:
    """The offsets (N, 4) from boxes with an area to targets with an area."""
    centers_N2, sizes_N2 = _centers_and_sizes(boxes_N4)
    target_centers_N2, target_sizes_N2 = _centers_and_sizes(targets_N4)
    return np.hstack([(target_centers_N2 - centers_N2) / sizes_N2, np.log(target_sizes_N2 / sizes_N2)])


def moved(boxes_N4: np.ndarray, offsets_N4: np.ndarray) -> np.ndarray:
    """The boxes at these offsets: the inverse of `offsets`."""
    centers_N2, sizes_N2 = _centers_and_sizes(boxes_N4)
    centers_N2 = centers_N2 + offsets_N4[:, :2] * sizes_N2
    half_N2 = sizes_N2 * np.exp(offsets_N4[:, 2:]) / 2
    return np.hstack([centers_N2 - half_N2, centers_N2 + half_N2])


def _centers_and_sizes(boxes_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low_N2, high_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    return (low_N2 + high_N2) / 2, high_N2 - low_N2
