"""Masks as runs of pixels along columns, which are counted without rasters.

Runs are int64 (K, 2): first pixel and the pixel after the last one, as numbered along the columns of the image.
"""

from __future__ import annotations

import numpy as np


def union(runs_K2: np.ndarray) -> np.ndarray:
    """Runs in ascending order that neither overlap nor touch, and are not empty, with the same pixels."""
    runs = runs_K2[runs_K2[:, 1] > runs_K2[:, 0]]
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    ends = np.maximum.accumulate(runs[:, 1])
    first = np.flatnonzero(np.append(True, runs[1:, 0] > ends[:-1])[: len(runs)])
    return np.stack([runs[first, 0], np.append(ends[first[1:] - 1], ends[-1:])], 1)


def from_mask(mask_HW: np.ndarray) -> np.ndarray:
    """The runs of a bool mask, as `union` returns them."""
    flat = np.pad(mask_HW.T.reshape(-1), 1)
    return np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)


def area(runs_K2: np.ndarray) -> int:
    """Number of pixels; the runs do not overlap."""
    return int((runs_K2[:, 1] - runs_K2[:, 0]).sum())


def intersection(ours_K2: np.ndarray, theirs_M2: np.ndarray) -> int:
    """Number of pixels in both; each as `union` returns them."""
    if not len(theirs_M2):
        return 0
    starts, lengths = theirs_M2[:, 0], theirs_M2[:, 1] - theirs_M2[:, 0]
    before = np.cumsum(lengths) - lengths

    def pixels_up_to(positions: np.ndarray) -> np.ndarray:
        last = np.searchsorted(starts, positions, "right") - 1
        within = np.minimum(positions - starts[last], lengths[last])
        return np.where(last >= 0, before[last] + within, 0)

    return int((pixels_up_to(ours_K2[:, 1]) - pixels_up_to(ours_K2[:, 0])).sum())


def columns_of(runs_K2: np.ndarray, height: int) -> tuple[int, int]:
    """The first column of runs that are not empty, and the one after the last."""
    return int(runs_K2[0, 0]) // height, -(-int(runs_K2[-1, 1]) // height)


def to_mask(runs_K2: np.ndarray, height: int, columns: tuple[int, int]) -> np.ndarray:
    """Bool (height, columns): the mask in some columns of the image, which contain all runs."""
    first, end = columns
    flat = np.zeros((end - first) * height, bool)
    for start, stop in (runs_K2 - first * height).tolist():
        flat[start:stop] = True
    return flat.reshape(end - first, height).T
