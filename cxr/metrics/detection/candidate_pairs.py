"""Found and true boxes of the same image that can be one: all pairs at once, with their IoU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.boxes import paired_iou
from cxr.metrics.localization import Boxes


@dataclass(frozen=True)
class Pairs:
    """P pairs, by rising number of the found box, then of the true one."""

    found: np.ndarray  # (P,) row of the found boxes
    true: np.ndarray  # (P,) row of the true boxes
    iou: np.ndarray  # (P,) float64

    def at(self, kept: np.ndarray) -> Pairs:
        """Some of the pairs, by a mask or an index."""
        return Pairs(self.found[kept], self.true[kept], self.iou[kept])

    def firsts(self) -> np.ndarray:
        """Where the pairs of each found box begin."""
        return np.flatnonzero(np.diff(self.found, prepend=-1))

    def best(self) -> Pairs:
        """The pair with the highest IoU of each found box that has any, the first of equals."""
        starts = self.firsts()
        if not len(starts):
            return self
        highest = np.repeat(np.maximum.reduceat(self.iou, starts), np.diff([*starts.tolist(), len(self.iou)]))
        kept = np.flatnonzero(self.iou == highest)
        return self.at(kept[np.diff(self.found[kept], prepend=-1) > 0])


def pairs(found: Boxes, true: Boxes, *, any_finding: bool = False) -> Pairs:
    """All pairs of one image and, unless `any_finding`, of one finding that overlap at all."""
    findings = 1 + max(found.finding.max(initial=0), true.finding.max(initial=0))
    ours, theirs = (b.image if any_finding else b.image * findings + b.finding for b in (found, true))
    order = np.argsort(theirs, kind="stable")
    first = np.searchsorted(theirs[order], ours, "left")
    count = np.searchsorted(theirs[order], ours, "right") - first
    of_found = np.repeat(np.arange(len(ours)), count)
    within = np.arange(len(of_found)) - np.repeat(np.cumsum(count) - count, count)
    of_true = order[np.repeat(first, count) + within]
    every = Pairs(of_found, of_true, paired_iou(found.xyxy[of_found], true.xyxy[of_true]))
    return every.at(every.iou > 0)
