"""Overlap of boxes: areas, intersections, IoU, IoBB."""

from __future__ import annotations

import numpy as np


def areas(boxes_N4: np.ndarray) -> np.ndarray:
    """(N,) area; 0 if a side is not positive."""
    boxes = np.asarray(boxes_N4, np.float64)
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def intersections(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M) area of the intersection of each pair of boxes."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a_N4, b_M4))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.maximum(sides, 0)
    return sides[..., 0] * sides[..., 1]


def iou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union in [0, 1]; 0 if either box has no area."""
    shared = intersections(a_N4, b_M4)
    return _ratio(shared, areas(a_N4).reshape(-1, 1) + areas(b_M4).reshape(1, -1) - shared)


def iobb(pred_N4: np.ndarray, true_M4: np.ndarray) -> np.ndarray:
    """(N, M) intersection over the area of the predicted box (Wang et al. 2017), in [0, 1]; 0 if it has no area."""
    return _ratio(intersections(pred_N4, true_M4), areas(pred_N4).reshape(-1, 1))


def paired_iou(a_N4: np.ndarray, b_N4: np.ndarray) -> np.ndarray:
    """(N,) intersection over union of corresponding boxes; 0 if either has no area."""
    shared = _paired_intersections(a_N4, b_N4)
    return _ratio(shared, areas(a_N4) + areas(b_N4) - shared)


def paired_iobb(pred_N4: np.ndarray, true_N4: np.ndarray) -> np.ndarray:
    """(N,) intersection over the area of the predicted box of corresponding boxes; 0 if that has no area."""
    return _ratio(_paired_intersections(pred_N4, true_N4), areas(pred_N4))


def _paired_intersections(a_N4: np.ndarray, b_N4: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a_N4, np.float64), np.asarray(b_N4, np.float64)
    return areas(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], 1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
