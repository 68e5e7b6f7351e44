"""Overlap of predicted and ground-truth boxes: the best of each image-finding pair, and of each predicted box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr import boxes
from cxr.metrics.localization.box_arrays import Boxes
from cxr.schema import NEGATIVE

MEASURES = ("iou", "iobb")  # intersection over union; over the area of the predicted box (Wang et al. 2017)
THRESHOLDS = tuple(tenths / 10 for tenths in range(1, 10))


@dataclass(frozen=True)
class Located:
    """N images, F findings, and the M predicted boxes that are known to be correct or not."""

    best: dict[str, np.ndarray]  # measure -> (N, F) largest overlap with a ground-truth box, NaN without one
    pointed: np.ndarray  # (N, F) 1 if the center of the box with the highest score is in one, else 0; NaN without one
    known: np.ndarray  # (N, F) bool: all boxes of the finding in the image are known
    image: np.ndarray  # (M,) image of each predicted box
    finding: np.ndarray  # (M,)
    overlap: dict[str, np.ndarray]  # measure -> (M,) largest with a ground-truth box of the finding, 0 without one

    def at(self, images: np.ndarray) -> Located:
        """Some of the images, by ascending rows."""
        selected = np.isin(self.image, images)
        return Located(
            best={name: values[images] for name, values in self.best.items()},
            pointed=self.pointed[images],
            known=self.known[images],
            image=np.searchsorted(images, self.image[selected]),
            finding=self.finding[selected],
            overlap={name: values[selected] for name, values in self.overlap.items()},
        )

    def of(self, findings: Sequence[int]) -> Located:
        """Some of the findings, by their indices, in this order."""
        column = np.full(self.known.shape[1], -1)
        column[list(findings)] = np.arange(len(findings))
        selected = column[self.finding] >= 0
        return Located(
            best={name: values[:, findings] for name, values in self.best.items()},
            pointed=self.pointed[:, findings],
            known=self.known[:, findings],
            image=self.image[selected],
            finding=column[self.finding[selected]],
            overlap={name: values[selected] for name, values in self.overlap.items()},
        )

    def localized(self, measure: str, threshold: float) -> np.ndarray:
        """(N, F) 1 if the overlap of a predicted box exceeds the threshold, otherwise 0; NaN without a ground-truth
        box."""
        best = self.best[measure]
        return np.where(np.isnan(best), np.nan, best > threshold)

    def false_positives(self, measure: str, threshold: float) -> np.ndarray:
        """(N, F) number of predicted boxes whose overlap does not exceed the threshold; NaN if the pair is not
        `known`."""
        missed = ~(self.overlap[measure] > threshold)
        count = np.zeros(self.known.shape)
        np.add.at(count, (self.image[missed], self.finding[missed]), 1)
        return np.where(self.known, count, np.nan)


def known_places(true: Boxes, labels_NF: np.ndarray) -> np.ndarray:
    """(N, F) bool: whether all boxes of a finding in an image are known.

    They are known if a box of the finding is listed, or if its label is negative. For a positive finding without a
    box, or an unknown label, predicted boxes cannot be evaluated.

    Args:
        labels_NF: 1, 0, −1 unknown.
    """
    known = labels_NF == NEGATIVE
    known[true.image, true.finding] = True
    return known


def locate(predicted: Boxes, true: Boxes, known_NF: np.ndarray) -> Located:
    """Compare boxes in one frame. The overlap of a pair is the largest of any of its predicted boxes with any true
    box."""
    predicted, true = (
        _sorted(predicted.at(known_NF[predicted.image, predicted.finding]), known_NF),
        _sorted(true, known_NF),
    )
    ours, theirs = (_keys(boxes_of, known_NF) for boxes_of in (predicted, true))
    first = np.searchsorted(theirs, ours, "left")
    count = np.searchsorted(theirs, ours, "right") - first  # ground-truth boxes of the same pair
    of_predicted, of_true = _combined(np.arange(len(ours)), first, count)
    starts, boxed = np.flatnonzero(np.diff(of_predicted, prepend=-1)), count > 0
    best: dict[str, np.ndarray] = {}
    overlap: dict[str, np.ndarray] = {}
    for name, measured in zip(MEASURES, (boxes.paired_iou, boxes.paired_iobb), strict=True):
        values = measured(predicted.xyxy[of_predicted], true.xyxy[of_true])
        overlap[name] = np.zeros(len(ours))
        overlap[name][boxed] = np.maximum.reduceat(values, starts) if len(starts) else values
        best[name] = _zero_where(theirs, known_NF)
        np.maximum.at(best[name].reshape(-1), ours[boxed], overlap[name][boxed])
    pointed = _zero_where(theirs, known_NF)
    strongest = np.lexsort((np.arange(len(ours)), -predicted.score, ours))
    strongest = strongest[np.flatnonzero(np.diff(ours[strongest], prepend=-1))]  # the first of each pair
    of_predicted, of_true = _combined(strongest, first[strongest], count[strongest])
    inside = _center_in(predicted.xyxy[of_predicted], true.xyxy[of_true])
    np.maximum.at(pointed.reshape(-1), ours[of_predicted], inside.astype(np.float64))
    return Located(best, pointed, known_NF, predicted.image, predicted.finding, overlap)


def _combined(predicted_M: np.ndarray, first_M: np.ndarray, count_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) predicted boxes and (K,) ground-truth boxes: each predicted box with its `count` ground-truth boxes from
    `first` on."""
    within = np.arange(count_M.sum()) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    return np.repeat(predicted_M, count_M), np.repeat(first_M, count_M) + within


def _zero_where(true_keys: np.ndarray, known_NF: np.ndarray) -> np.ndarray:
    """(N, F) 0 where there is a ground-truth box, elsewhere NaN."""
    values = np.full(known_NF.shape, np.nan)
    values.reshape(-1)[true_keys] = 0
    return values


def _center_in(predicted_K4: np.ndarray, true_K4: np.ndarray) -> np.ndarray:
    """(K,) bool: whether the center of the predicted box is in the ground-truth box."""
    center = (predicted_K4[:, :2] + predicted_K4[:, 2:]) / 2
    return np.logical_and.reduce((true_K4[:, :2] <= center) & (center <= true_K4[:, 2:]), axis=1)


def _keys(boxes_of: Boxes, known_NF: np.ndarray) -> np.ndarray:
    return boxes_of.image * known_NF.shape[1] + boxes_of.finding


def _sorted(boxes_of: Boxes, known_NF: np.ndarray) -> Boxes:
    return boxes_of.at(np.argsort(_keys(boxes_of, known_NF), kind="stable"))


def counts(located: Located, measure: str, threshold: float) -> np.ndarray:
    """(4, F) int64, to be added over workers: localized pairs, pairs, false positives, images for which these are
    known."""
    localized, false_positives = located.localized(measure, threshold), located.false_positives(measure, threshold)
    sums = (
        np.nansum(localized, 0),
        np.isfinite(localized).sum(0),
        np.nansum(false_positives, 0),
        located.known.sum(0),
    )
    return np.stack(sums).astype(np.int64)
