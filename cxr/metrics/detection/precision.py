"""From right and wrong boxes to precision and recall, average precision, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import ratio, resamples_of
from cxr.metrics.localization import Boxes

_COCO_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Curve:
    """One finding's counts along its predicted boxes, best score first; boxes of the same score share one count."""

    scores: np.ndarray  # (M,) falling
    right: np.ndarray  # (M,) so far
    wrong: np.ndarray  # (M,) so far
    true: int  # true boxes

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray, true: int) -> Curve:
        order = np.argsort(-scores, kind="stable")
        scores, right = scores[order], right[order].astype(np.int64)
        last = np.searchsorted(-scores, -scores, "right") - 1
        return cls(scores, np.cumsum(right)[last], np.cumsum(1 - right)[last], true)

    @property
    def recall(self) -> np.ndarray:
        """(M,) NaN without a true box."""
        return ratio(self.right, np.full(len(self.right), self.true))

    @property
    def precision(self) -> np.ndarray:
        """(M,) never rising: the highest at this recall or a higher one."""
        precision = self.right / np.maximum(1, self.right + self.wrong)
        return np.maximum.accumulate(precision[::-1])[::-1]

    def counts_at(self, scores_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S,) right and wrong boxes with at least each of these scores."""
        count = np.searchsorted(-self.scores, -scores_S, "right")
        return np.append(0, self.right)[count], np.append(0, self.wrong)[count]

    def voc_ap(self) -> float:
        """Area under the curve, all points (VOC 2010); NaN without a true box."""
        gained = np.diff(self.right, prepend=0)
        return float(ratio(np.array((gained * self.precision).sum()), np.array(self.true)))

    def coco_ap(self) -> float:
        """Mean precision at the 101 recalls 0, .01, …, 1 (COCO); NaN without a true box."""
        if not self.true:
            return float("nan")
        at = np.searchsorted(self.recall, _COCO_RECALLS, "left")
        return float(np.append(self.precision, 0)[at].mean())

    def best_f1(self) -> tuple[float, float]:
        """The highest F1 that boxes from some score on have, and that score.

        NaN for both without a true box; an F1 of 0, at NaN, without a predicted one.
        """
        if not self.true or not len(self.scores):
            return (0.0 if self.true else float("nan")), float("nan")
        f1 = 2 * self.right / (self.right + self.wrong + self.true)
        best = int(f1.argmax())
        return float(f1[best]), float(self.scores[best])


def curves(predicted: Boxes, right_M: np.ndarray, true: Boxes, findings: int) -> list[Curve]:
    """One a finding."""
    counts = np.bincount(true.finding, minlength=findings)
    rows = (np.flatnonzero(predicted.finding == finding) for finding in range(findings))
    return [Curve.of(predicted.score[of], right_M[of], int(count)) for of, count in zip(rows, counts, strict=True)]


def resampled_aps(
    predicted: Boxes,
    right_M: np.ndarray,
    true: Boxes,
    patients_N: np.ndarray,
    findings: int,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """(R, F) VOC's average precision in each resample, NaN without a true box. The draws hang on patients and seed.

    Args:
        patients_N: an id an image, of any type that sorts; images of a patient are drawn together.
    """
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    weighted = [_Weighted.of(predicted, right_M, true, patients, finding) for finding in range(findings)]
    if not weighted or not len(ids):
        return np.full((resamples, findings), np.nan)
    return np.concatenate(
        [np.stack([of.aps(times) for of in weighted], 1) for times in resamples_of(len(ids), resamples, seed)]
    )


@dataclass(frozen=True)
class _Weighted:
    """A finding sorted once: whose its boxes are, the wrong ones in heaps between two scores of right ones."""

    right: np.ndarray  # (T,) patient of each right box, best score first
    ends: np.ndarray  # (T,) the last right box of the same score
    wrong: np.ndarray  # (W,) patient of each wrong box that a right one does not outrank, by heap
    heaps: np.ndarray  # (W,) the first of the right boxes that it is not outranked by
    true: np.ndarray  # (B,) patient of each true box

    @classmethod
    def of(
        cls, predicted: Boxes, right_M: np.ndarray, true: Boxes, patients_N: np.ndarray, finding: int
    ) -> _Weighted:
        patients, own = patients_N[predicted.image], predicted.finding == finding
        rows, others = (np.flatnonzero(own & kind) for kind in (right_M, ~right_M))
        rows = rows[np.argsort(-predicted.score[rows], kind="stable")]
        falling = -predicted.score[rows]
        heaps = np.searchsorted(falling, -predicted.score[others], "left")
        kept = np.argsort(heaps, kind="stable")[: int((heaps < len(rows)).sum())]
        ends = np.searchsorted(falling, falling, "right") - 1
        of_true = patients_N[true.image[true.finding == finding]]
        return cls(patients[rows], ends, patients[others[kept]], heaps[kept], of_true)

    def aps(self, times_PR: np.ndarray) -> np.ndarray:
        """(R,) where each patient's images count as often as the patient was drawn; NaN without a true box."""
        gained = times_PR[self.right]
        wrong = np.zeros(gained.shape, np.int64)
        if len(self.wrong):
            starts = np.flatnonzero(np.diff(self.heaps, prepend=-1))
            wrong[self.heaps[starts]] = np.add.reduceat(times_PR[self.wrong], starts, axis=0)
        right, wrong = (np.cumsum(counts, axis=0)[self.ends] for counts in (gained, wrong))
        precision = ratio(right, right + wrong)
        highest = np.fmax.accumulate(precision[::-1], axis=0)[::-1]
        return ratio(np.nansum(gained * highest, axis=0), times_PR[self.true].sum(0))
