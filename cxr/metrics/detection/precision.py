"""From true and false positives to precision and recall, average precision, and its resamples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import ratio, resample
from cxr.metrics.localization import Boxes

_COCO_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Curve:
    """One finding's cumulative counts, highest score first; boxes with the same score share one count."""

    scores: np.ndarray  # (M,) descending
    true_positive: np.ndarray  # (M,) cumulative number of true positives
    false_positive: np.ndarray  # (M,) cumulative number of false positives
    true: int  # ground-truth boxes

    @classmethod
    def of(cls, scores: np.ndarray, true_positive: np.ndarray, true: int) -> Curve:
        order = np.argsort(-scores, kind="stable")
        scores, true_positive = scores[order], true_positive[order].astype(np.int64)
        last = np.searchsorted(-scores, -scores, "right") - 1
        return cls(scores, np.cumsum(true_positive)[last], np.cumsum(1 - true_positive)[last], true)

    @property
    def recall(self) -> np.ndarray:
        """(M,) NaN without a ground-truth box."""
        return ratio(self.true_positive, np.full(len(self.true_positive), self.true))

    @property
    def precision(self) -> np.ndarray:
        """(M,) the highest precision at this recall or a higher one."""
        precision = self.true_positive / np.maximum(1, self.true_positive + self.false_positive)
        return np.maximum.accumulate(precision[::-1])[::-1]

    def counts_at(self, scores_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S,) true and false positives with at least each of these scores."""
        count = np.searchsorted(-self.scores, -scores_S, "right")
        return np.append(0, self.true_positive)[count], np.append(0, self.false_positive)[count]

    def voc_ap(self) -> float:
        """Area under the curve, all points (VOC 2010); NaN without a ground-truth box."""
        gains = np.diff(self.true_positive, prepend=0)
        return float(ratio(np.array((gains * self.precision).sum()), np.array(self.true)))

    def coco_ap(self) -> float:
        """Mean precision at the 101 recalls 0, .01, …, 1 (COCO); NaN without a ground-truth box."""
        if not self.true:
            return float("nan")
        at = np.searchsorted(self.recall, _COCO_RECALLS, "left")
        return float(np.append(self.precision, 0)[at].mean())

    def sensitivity_at(self, false_positives: float) -> float:
        """The highest recall of any score threshold with at most so many false positives; NaN without a ground-truth
        box."""
        if not self.true:
            return float("nan")
        return float(self.recall[self.false_positive <= false_positives].max(initial=0))

    def best_f1(self) -> tuple[float, float]:
        """The highest F1 of any score threshold, and that threshold.

        Both are NaN without a ground-truth box. Without a predicted box, F1 is 0 and the threshold NaN.
        """
        if not self.true or not len(self.scores):
            return (0.0 if self.true else float("nan")), float("nan")
        f1 = 2 * self.true_positive / (self.true_positive + self.false_positive + self.true)
        best = int(f1.argmax())
        return float(f1[best]), float(self.scores[best])


def curves(predicted: Boxes, true_positive_M: np.ndarray, true: Boxes, findings: int) -> list[Curve]:
    """One curve per finding."""
    counts = np.bincount(true.finding, minlength=findings)
    rows = (np.flatnonzero(predicted.finding == finding) for finding in range(findings))
    return [
        Curve.of(predicted.score[of], true_positive_M[of], int(count)) for of, count in zip(rows, counts, strict=True)
    ]


def resampled_aps(
    predicted: Boxes,
    true_positive_M: np.ndarray,
    true: Boxes,
    patients_N: np.ndarray,
    findings: int,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """(R, F) VOC's average precision in each resample, NaN without a ground-truth box. It depends only on patients
    and seed.

    Args:
        patients_N: one id per image, of any sortable type; images of a patient are resampled together.
    """
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    weighted = [_Weighted.of(predicted, true_positive_M, true, patients, finding) for finding in range(findings)]
    if not weighted or not len(ids):
        return np.full((resamples, findings), np.nan)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        return np.stack([of.aps(times_PR) for of in weighted], 1)

    return resample(len(ids), resamples, seed, measure, rows=len(predicted.image))


@dataclass(frozen=True)
class _Weighted:
    """One finding, sorted once: the patients of its boxes. False positives are grouped between scores of true
    positives."""

    true_positive: np.ndarray  # (T,) patient of each true positive, highest score first
    ends: np.ndarray  # (T,) the last true positive with the same score
    false_positive: (
        np.ndarray
    )  # (W,) patient of each false positive with at least the score of some true positive, by group
    groups: np.ndarray  # (W,) group: the first true positive whose score is not higher
    true: np.ndarray  # (B,) patient of each ground-truth box

    @classmethod
    def of(
        cls, predicted: Boxes, true_positive_M: np.ndarray, true: Boxes, patients_N: np.ndarray, finding: int
    ) -> _Weighted:
        patients, own = patients_N[predicted.image], predicted.finding == finding
        rows, false_positives = (np.flatnonzero(own & kind) for kind in (true_positive_M, ~true_positive_M))
        rows = rows[np.argsort(-predicted.score[rows], kind="stable")]
        falling = -predicted.score[rows]
        groups = np.searchsorted(falling, -predicted.score[false_positives], "left")
        grouped = np.argsort(groups, kind="stable")[: int((groups < len(rows)).sum())]
        ends = np.searchsorted(falling, falling, "right") - 1
        of_true = patients_N[true.image[true.finding == finding]]
        return cls(patients[rows], ends, patients[false_positives[grouped]], groups[grouped], of_true)

    def aps(self, times_PR: np.ndarray) -> np.ndarray:
        """(R,) average precision if each patient's images count as often as the patient was sampled; NaN without
        a ground-truth box."""
        gains = times_PR[self.true_positive]
        false_positive = np.zeros(gains.shape, np.int64)
        if len(self.false_positive):
            starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
            false_positive[self.groups[starts]] = np.add.reduceat(times_PR[self.false_positive], starts, axis=0)
        true_positive, false_positive = (np.cumsum(counts, axis=0)[self.ends] for counts in (gains, false_positive))
        precision = ratio(true_positive, true_positive + false_positive)
        highest = np.fmax.accumulate(precision[::-1], axis=0)[::-1]
        return ratio(np.nansum(gains * highest, axis=0), times_PR[self.true].sum(0))
