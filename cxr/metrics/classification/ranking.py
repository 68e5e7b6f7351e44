"""Metrics that depend only on the order of the scores: AUROC, average precision, curves. Ties are counted exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import ratio
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN


@dataclass(frozen=True)
class Ranked:
    """Counts along the images of each finding, highest score first; images that tie share one count.

    Row i: counts at the threshold equal to image i's score (ties included). Images without a known label come last,
    with a score of −inf, and do not count.
    """

    scores: np.ndarray  # (N, F) float64, descending
    true: np.ndarray  # (N, F) positives predicted positive
    false: np.ndarray  # (N, F) negatives predicted positive
    positives: np.ndarray  # (F,)
    negatives: np.ndarray  # (F,)

    @property
    def measurable(self) -> np.ndarray:
        """(F,) bool: both classes are there."""
        return (self.positives > 0) & (self.negatives > 0)


def checked(scores_NF: np.ndarray, labels_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; scores as float64, and 0 where the label is unknown.

    Raises:
        ValueError: the shapes differ, a label is not 1, 0 or −1, or the score of a known label is NaN or outside [0,
            1].
    """
    scores, labels = np.asarray(scores_NF, np.float64), np.asarray(labels_NF)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"expected scores and labels (images, findings), got {scores.shape} and {labels.shape}")
    if not np.isin(labels, (POSITIVE, NEGATIVE, UNKNOWN)).all():
        raise ValueError(f"expected labels 1, 0 and −1 (unknown), got {np.unique(labels)}")
    known = labels != UNKNOWN
    if not (known <= ((scores >= 0) & (scores <= 1))).all():
        raise ValueError("expected probabilities in [0, 1], got scores outside that range, or NaN")
    return np.where(known, scores, 0.0), labels


def ranked(scores_NF: np.ndarray, labels_NF: np.ndarray) -> Ranked:
    """Sort the images of each finding once; raises like `checked`."""
    scores, labels = checked(scores_NF, labels_NF)
    scores = np.where(labels == UNKNOWN, -np.inf, scores)
    order = np.argsort(-scores, axis=0, kind="stable")
    scores, labels = np.take_along_axis(scores, order, 0), np.take_along_axis(labels, order, 0)
    ends = _ends_of_ties(scores)
    true, false = (np.cumsum(labels == kind, axis=0) for kind in (POSITIVE, NEGATIVE))
    return Ranked(
        scores=scores,
        true=np.take_along_axis(true, ends, 0),
        false=np.take_along_axis(false, ends, 0),
        positives=(labels == POSITIVE).sum(0),
        negatives=(labels == NEGATIVE).sum(0),
    )


def ranked_resamples(scores_N: np.ndarray, labels_N: np.ndarray, times_NR: np.ndarray) -> Ranked:
    """One finding's images as `ranked` counts them in each of R resamples, in place of findings.

    Args:
        times_NR: how often each image is sampled.
    """
    scores, labels = checked(scores_N[:, None], labels_N[:, None])
    order = np.argsort(-np.where(labels == UNKNOWN, -np.inf, scores)[:, 0], kind="stable")
    scores, labels, times = scores[order], labels[order], times_NR[order]
    scores = np.where(labels == UNKNOWN, -np.inf, scores)
    ends = _ends_of_ties(scores)[:, 0]
    true, false = (np.cumsum(times * (labels == kind), axis=0) for kind in (POSITIVE, NEGATIVE))
    totals = [counts[-1] if len(counts) else np.zeros(times.shape[1], int) for counts in (true, false)]
    return Ranked(np.broadcast_to(scores, times.shape), true[ends], false[ends], *totals)


def _ends_of_ties(scores_NF: np.ndarray) -> np.ndarray:
    """The last row that has the same score as each row; columns are sorted."""
    rows = len(scores_NF)
    ends = np.broadcast_to(np.arange(rows)[:, None], scores_NF.shape).copy()
    ends[:-1][scores_NF[:-1] == scores_NF[1:]] = rows
    return np.minimum.accumulate(ends[::-1], axis=0)[::-1]


def auroc(scores_NF: np.ndarray, labels_NF: np.ndarray) -> np.ndarray:
    """(F,) area under the ROC curve, the probability that a positive ranks above a negative; NaN without both
    classes."""
    ranks = ranked(scores_NF, labels_NF)
    return ratio(_from_zero_area(ranks), ranks.positives * ranks.negatives)


def _from_zero_area(ranks: Ranked) -> np.ndarray:
    true, false = (np.pad(counts, ((1, 0), (0, 0))) for counts in (ranks.true, ranks.false))
    return np.trapezoid(true, false, axis=0)


def average_precision(scores_NF: np.ndarray, labels_NF: np.ndarray) -> np.ndarray:
    """(F,) mean over the positives of the precision at each one's score; NaN without both classes.

    The step-wise sum of scikit-learn, without interpolation.
    """
    ranks = ranked(scores_NF, labels_NF)
    precision = ranks.true / np.maximum(1, ranks.true + ranks.false)
    gained = np.diff(ranks.true, axis=0, prepend=0)
    return np.where(ranks.measurable, ratio((gained * precision).sum(0), ranks.positives), np.nan)


def specificity_counts(negatives: np.ndarray, specificity: float) -> np.ndarray:
    """The number of negatives that may be predicted positive at this specificity."""
    return np.floor((1 - specificity) * negatives + 1e-9)


def sensitivity_at(scores_NF: np.ndarray, labels_NF: np.ndarray, specificity: float = 0.9) -> np.ndarray:
    """(F,) highest sensitivity of any threshold with at least this specificity; NaN without both classes."""
    ranks = ranked(scores_NF, labels_NF)
    allowed = ranks.false <= specificity_counts(ranks.negatives, specificity)
    best = np.where(allowed, ranks.true, 0).max(0, initial=0)
    return np.where(ranks.measurable, ratio(best, ranks.positives), np.nan)


def roc_curve(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One finding's false and true positive rates from (0, 0) to (1, 1), one point per distinct score.

    Raises:
        ValueError: a class is missing.
    """
    false, true = _steps(scores_N, labels_N)
    return false / false[-1], true / true[-1]


def precision_recall_curve(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One finding's precision and recall at each distinct score, in order of ascending recall; raises like
    `roc_curve`."""
    false, true = (counts[1:] for counts in _steps(scores_N, labels_N))
    return true / (true + false), true / true[-1]


def _steps(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of negatives and positives predicted positive, from none to all, each pair once."""
    ranks = ranked(scores_N[:, None], labels_N[:, None])
    if not ranks.measurable[0]:
        raise ValueError("a curve needs at least one positive and one negative label")
    pairs = np.stack([ranks.false[:, 0], ranks.true[:, 0]])
    pairs = np.pad(pairs, ((0, 0), (1, 0)))
    false, true = pairs[:, np.append(True, np.diff(pairs).any(0))]
    return false, true
