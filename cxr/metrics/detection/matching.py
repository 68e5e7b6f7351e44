"""Which predicted boxes are true positives: of those that match a ground-truth box, the one with the best score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cxr.metrics.detection.candidate_pairs import Pairs, pairs
from cxr.metrics.localization import Boxes

_MOST = 100  # boxes per image and finding that count in COCO


def by_score(predicted: Boxes) -> np.ndarray:
    """(M,) order by descending score; ties keep their order."""
    return np.argsort(-predicted.score, kind="stable")


def voc_true_positives(predicted: Boxes, candidates: Pairs, iou: float) -> np.ndarray:
    """(M,) bool: true positives of PASCAL VOC 2010 (Everingham et al.).

    Each predicted box is matched to the ground-truth box with the highest IoU. It is a true positive if the IoU
    exceeds `iou` and no box with a higher score matches that ground-truth box. Otherwise it is a false positive, even
    if another ground-truth box is unmatched.
    """
    best = candidates.best()
    best = best.at(best.iou > iou)
    rank = np.empty(len(predicted.score), np.int64)
    rank[by_score(predicted)] = np.arange(len(predicted.score))
    order = np.argsort(rank[best.predicted], kind="stable")
    _, first = np.unique(best.true[order], return_index=True)
    true_positive = np.zeros(len(predicted.score), bool)
    true_positive[best.predicted[order[first]]] = True
    return true_positive


def coco_true_positives(predicted: Boxes, true: Boxes, ious: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(T, M) bool: true positives of COCO (Lin et al. 2014), and (M,) bool: which predicted boxes count at all.

    In descending order of score, a predicted box is matched to the unmatched ground-truth box with the highest IoU,
    if it is at least `iou`. Only the 100 boxes with the highest scores per image and finding count.
    """
    rank = _ranks(predicted)
    every = pairs(predicted, true)
    every = every.at((every.iou >= min(ious)) & (rank[every.predicted] < _MOST))
    true_positive, taken = (np.zeros((len(ious), len(boxes.score)), bool) for boxes in (predicted, true))
    order = np.argsort(rank[every.predicted], kind="stable")
    every, ends = every.at(order), np.cumsum(np.bincount(rank[every.predicted]))
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False):
        step = every.at(np.arange(start, end))
        for t, iou in enumerate(ious):
            chosen = step.at((step.iou >= iou) & ~taken[t, step.true]).best()
            true_positive[t, chosen.predicted] = taken[t, chosen.true] = True
    return true_positive, rank < _MOST


def _ranks(predicted: Boxes) -> np.ndarray:
    """(M,) number of boxes of the same image and finding with a higher score."""
    order = np.lexsort((-predicted.score, predicted.finding, predicted.image))
    image, finding = predicted.image[order], predicted.finding[order]
    new = np.ones(len(order), bool)
    new[1:] = (image[1:] != image[:-1]) | (finding[1:] != finding[:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - starts
    return ranks
