"""Pairs of a predicted and a ground-truth box of the same image that may match, with their IoU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.boxes import paired_iou
from cxr.metrics.localization import Boxes


@dataclass(frozen=True)
class Pairs:
    """P pairs, in ascending order of the predicted box, then of the ground-truth box."""

    predicted: np.ndarray  # (P,) row of the predicted boxes
    true: np.ndarray  # (P,) row of the ground-truth boxes
    iou: np.ndarray  # (P,) float64

    def at(self, index: np.ndarray) -> Pairs:
        """Some of the pairs, by a mask or an index."""
        return Pairs(self.predicted[index], self.true[index], self.iou[index])

    def firsts(self) -> np.ndarray:
        """The index at which the pairs of each predicted box begin."""
        return np.flatnonzero(np.diff(self.predicted, prepend=-1))

    def best(self) -> Pairs:
        """The pair with the highest IoU of each predicted box that has any; the first of equal ones."""
        starts = self.firsts()
        if not len(starts):
            return self
        highest = np.repeat(np.maximum.reduceat(self.iou, starts), np.diff([*starts.tolist(), len(self.iou)]))
        first_best = np.flatnonzero(self.iou == highest)
        return self.at(first_best[np.diff(self.predicted[first_best], prepend=-1) > 0])


def pairs(predicted: Boxes, true: Boxes, *, any_finding: bool = False) -> Pairs:
    """All overlapping pairs of the same image and, unless `any_finding`, of the same finding."""
    findings = 1 + max(predicted.finding.max(initial=0), true.finding.max(initial=0))
    ours, theirs = (b.image if any_finding else b.image * findings + b.finding for b in (predicted, true))
    order = np.argsort(theirs, kind="stable")
    first = np.searchsorted(theirs[order], ours, "left")
    count = np.searchsorted(theirs[order], ours, "right") - first
    of_predicted = np.repeat(np.arange(len(ours)), count)
    within = np.arange(len(of_predicted)) - np.repeat(np.cumsum(count) - count, count)
    of_true = order[np.repeat(first, count) + within]
    every = Pairs(of_predicted, of_true, paired_iou(predicted.xyxy[of_predicted], true.xyxy[of_true]))
    return every.at(every.iou > 0)
