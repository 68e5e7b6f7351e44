"""Which predicted boxes are right: each true box is predicted once, by the best scored box that qualifies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cxr.metrics.detection.candidate_pairs import Pairs, pairs
from cxr.metrics.localization import Boxes

_MOST = 100  # boxes of an image and finding that COCO looks at


def by_score(predicted: Boxes) -> np.ndarray:
    """(M,) order by falling score, of equal ones as they stand."""
    return np.argsort(-predicted.score, kind="stable")


def voc_true_positives(predicted: Boxes, candidates: Pairs, iou: float) -> np.ndarray:
    """(M,) bool, as PASCAL VOC 2010 counts (Everingham et al.).

    A predicted box is held against the true box that it overlaps most. It is right if that is by more than `iou` and
    no better scored one was right by the same true box; else it is wrong, though another true box may be free.
    """
    best = candidates.best()
    best = best.at(best.iou > iou)
    place = np.empty(len(predicted.score), np.int64)
    place[by_score(predicted)] = np.arange(len(predicted.score))
    order = np.argsort(place[best.predicted], kind="stable")
    _, first = np.unique(best.true[order], return_index=True)
    right = np.zeros(len(predicted.score), bool)
    right[best.predicted[order[first]]] = True
    return right


def coco_true_positives(predicted: Boxes, true: Boxes, ious: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(T, M) bool, as COCO counts (Lin et al. 2014), and (M,) bool: which predicted boxes are looked at at all.

    Best score first, a predicted box takes of the true boxes that are still free the one that it overlaps most, by
    `iou` or more. Of an image and finding the 100 best are looked at.
    """
    rank = _ranks(predicted)
    every = pairs(predicted, true)
    every = every.at((every.iou >= min(ious)) & (rank[every.predicted] < _MOST))
    right, taken = (np.zeros((len(ious), len(boxes.score)), bool) for boxes in (predicted, true))
    order = np.argsort(rank[every.predicted], kind="stable")
    every, ends = every.at(order), np.cumsum(np.bincount(rank[every.predicted]))
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False):
        step = every.at(np.arange(start, end))
        for t, iou in enumerate(ious):
            chosen = step.at((step.iou >= iou) & ~taken[t, step.true]).best()
            right[t, chosen.predicted] = taken[t, chosen.true] = True
    return right, rank < _MOST


def _ranks(predicted: Boxes) -> np.ndarray:
    """(M,) how many boxes of the same image and finding have a better score."""
    order = np.lexsort((-predicted.score, predicted.finding, predicted.image))
    image, finding = predicted.image[order], predicted.finding[order]
    new = np.ones(len(order), bool)
    new[1:] = (image[1:] != image[:-1]) | (finding[1:] != finding[:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - starts
    return ranks
