"""Found boxes laid over true ones: the best overlap of each image-finding pair, and of each predicted box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr import boxes
from cxr.metrics.localization.box_arrays import Boxes
from cxr.schema import NEGATIVE

MEASURES = ("iou", "iobb")  # intersection over union; over the area of the predicted box (Wang et al. 2017)
THRESHOLDS = tuple(tenths / 10 for tenths in range(1, 10))
RIGHT, PAIRS, WRONG, IMAGES = range(4)


@dataclass(frozen=True)
class Located:
    """N images, F findings, and the M predicted boxes of which it is known whether they are right."""

    best: dict[
        str, np.ndarray
    ]  # measure -> (N, F) largest overlap of a predicted with a true box, NaN without a true one
    pointed: np.ndarray  # (N, F) 1 where the center of the best scored box lies in a true one, else 0; NaN likewise
    known: np.ndarray  # (N, F) bool: it is known whether and where the image shows the finding
    image: np.ndarray  # (M,) of predicted boxes
    finding: np.ndarray  # (M,)
    overlap: dict[str, np.ndarray]  # measure -> (M,) largest overlap with a true box of the finding, 0 without one

    def at(self, images: np.ndarray) -> Located:
        """Some of the images, by rising rows."""
        kept = np.isin(self.image, images)
        return Located(
            best={name: values[images] for name, values in self.best.items()},
            pointed=self.pointed[images],
            known=self.known[images],
            image=np.searchsorted(images, self.image[kept]),
            finding=self.finding[kept],
            overlap={name: values[kept] for name, values in self.overlap.items()},
        )

    def of(self, findings: Sequence[int]) -> Located:
        """Some of the findings, by their indices, in this order."""
        place = np.full(self.known.shape[1], -1)
        place[list(findings)] = np.arange(len(findings))
        kept = place[self.finding] >= 0
        return Located(
            best={name: values[:, findings] for name, values in self.best.items()},
            pointed=self.pointed[:, findings],
            known=self.known[:, findings],
            image=self.image[kept],
            finding=place[self.finding[kept]],
            overlap={name: values[kept] for name, values in self.overlap.items()},
        )

    def right(self, measure: str, threshold: float) -> np.ndarray:
        """(N, F) 1 where a predicted box passes, 0 where none does, NaN without a true box."""
        best = self.best[measure]
        return np.where(np.isnan(best), np.nan, best > threshold)

    def wrong(self, measure: str, threshold: float) -> np.ndarray:
        """(N, F) how many predicted boxes do not pass, NaN where it is not known which are wrong."""
        missed = ~(self.overlap[measure] > threshold)
        count = np.zeros(self.known.shape)
        np.add.at(count, (self.image[missed], self.finding[missed]), 1)
        return np.where(self.known, count, np.nan)


def known_places(true: Boxes, labels_NF: np.ndarray) -> np.ndarray:
    """(N, F) bool: it is known whether and where an image shows a finding.

    It is where a box of it is listed, and where its label is negative. A positive finding without a box is somewhere
    in the image, and one with an unknown label may be: neither can tell a right box from a wrong one.

    Args:
        labels_NF: 1, 0, −1 unknown.
    """
    known = labels_NF == NEGATIVE
    known[true.image, true.finding] = True
    return known


def locate(predicted: Boxes, true: Boxes, known_NF: np.ndarray) -> Located:
    """Compare boxes in one frame. A pair has as its overlap the largest of any predicted with any true box of it."""
    predicted, true = (
        _sorted(predicted.at(known_NF[predicted.image, predicted.finding]), known_NF),
        _sorted(true, known_NF),
    )
    best = {name: np.full(known_NF.shape, np.nan) for name in MEASURES}
    pointed = np.full(known_NF.shape, np.nan)
    overlap = {name: np.zeros(len(predicted.image)) for name in MEASURES}
    predicted_keys, true_keys = (_keys(some, known_NF) for some in (predicted, true))
    for key in np.unique(true_keys):
        place = np.unravel_index(key, known_NF.shape)
        ours, theirs = (slice(*np.searchsorted(keys, [key, key + 1])) for keys in (predicted_keys, true_keys))
        for name, measured in zip(MEASURES, (boxes.iou, boxes.iobb), strict=True):
            overlap[name][ours] = measured(predicted.xyxy[ours], true.xyxy[theirs]).max(1)
            best[name][place] = overlap[name][ours].max(initial=0)
        pointed[place] = _points_into(predicted.at(np.arange(ours.start, ours.stop)), true.xyxy[theirs])
    return Located(best, pointed, known_NF, predicted.image, predicted.finding, overlap)


def _keys(some: Boxes, known_NF: np.ndarray) -> np.ndarray:
    return some.image * known_NF.shape[1] + some.finding


def _sorted(some: Boxes, known_NF: np.ndarray) -> Boxes:
    return some.at(np.argsort(_keys(some, known_NF), kind="stable"))


def _points_into(predicted: Boxes, true_K4: np.ndarray) -> bool:
    """Whether the center of the box with the highest score, the first of several, lies in a true box."""
    if not len(predicted.image):
        return False
    box = predicted.xyxy[int(np.argmax(predicted.score))]
    center = (box[:2] + box[2:]) / 2
    return bool(((true_K4[:, :2] <= center) & (center <= true_K4[:, 2:])).all(1).any())


def counts(located: Located, measure: str, threshold: float) -> np.ndarray:
    """(4, F) int64, to be added over workers: right pairs, pairs, wrong boxes, images of which these are known."""
    right, wrong = located.right(measure, threshold), located.wrong(measure, threshold)
    told = (np.nansum(right, 0), np.isfinite(right).sum(0), np.nansum(wrong, 0), located.known.sum(0))
    return np.stack(told).astype(np.int64)
