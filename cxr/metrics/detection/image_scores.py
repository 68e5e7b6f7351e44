"""Image-level scores of predicted boxes, and confusions between findings."""

from __future__ import annotations

import numpy as np

from cxr.metrics.detection.candidate_pairs import pairs
from cxr.metrics.localization import Boxes
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN


def image_probabilities(predicted: Boxes, images: int, findings: int) -> np.ndarray:
    """(N, F + 1) the highest score of each finding's boxes, 0 without boxes; last column: no finding, 1 − the
    highest."""
    highest = np.zeros((images, findings + 1))
    np.maximum.at(highest, (predicted.image, predicted.finding), predicted.score)
    highest[:, -1] = 1 - highest[:, :-1].max(1, initial=0)
    return highest


def image_labels(true: Boxes, known_NF: np.ndarray) -> np.ndarray:
    """int8 (N, F + 1): 1 with a ground-truth box, 0 without, −1 if unknown; last column: no finding."""
    labels = np.where(known_NF, NEGATIVE, UNKNOWN).astype(np.int8)
    labels[true.image, true.finding] = POSITIVE
    some, none = (labels == POSITIVE).any(1), (labels == NEGATIVE).all(1)
    normal = np.select([some, none], [NEGATIVE, POSITIVE], UNKNOWN).astype(np.int8)
    return np.concatenate([labels, normal[:, None]], axis=1)


def confusion(predicted: Boxes, true: Boxes, findings: int, *, iou: float, score: float) -> np.ndarray:
    """(F + 1, F + 1) int64: rows are predicted findings, columns true ones; the last of each is background.

    Boxes with a score of at least `score` are matched one to one with ground-truth boxes of the same image, whatever
    their findings, in descending order of IoU, if the IoU is above `iou`. Unmatched boxes count as background of the
    other side.
    """
    predicted = predicted.at(predicted.score >= score)
    every = pairs(predicted, true, any_finding=True)
    every = every.at(every.iou > iou)
    every = every.at(np.argsort(-every.iou, kind="stable"))
    partner = np.full(len(predicted.score), -1)
    free = np.ones(len(true.score), bool)
    for ours, theirs in zip(every.predicted.tolist(), every.true.tolist(), strict=True):
        if partner[ours] < 0 and free[theirs]:
            partner[ours], free[theirs] = theirs, False
    there = np.where(partner < 0, findings, true.finding[partner]) if len(free) else np.full(len(partner), findings)
    said = np.concatenate([predicted.finding, np.full(free.sum(), findings)])
    cells = said * (findings + 1) + np.concatenate([there, true.finding[free]])
    return np.bincount(cells, minlength=(findings + 1) ** 2).reshape(findings + 1, findings + 1)
