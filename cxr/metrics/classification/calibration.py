"""Calibration of probabilities: Brier score, calibration error, reliability diagram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import ratio
from cxr.metrics.classification.ranking import checked
from cxr.schema import POSITIVE, UNKNOWN

BINS = 15


@dataclass(frozen=True)
class Bins:
    """Images by probability, in equally wide bins [i / B, (i + 1) / B), the last one closed. Arrays are (F, B)."""

    counts: np.ndarray
    probability: np.ndarray  # mean of the bin; NaN for an empty one
    observed: np.ndarray  # share of positives; NaN for an empty one


def brier(scores_NF: np.ndarray, labels_NF: np.ndarray) -> np.ndarray:
    """(F,) mean squared difference of probability and outcome (Brier 1950); NaN without a known label."""
    scores, labels = checked(scores_NF, labels_NF)
    known = labels != UNKNOWN
    squared = np.where(known, (scores - (labels == POSITIVE)) ** 2, 0)
    return ratio(squared.sum(0), known.sum(0))


def reliability(scores_NF: np.ndarray, labels_NF: np.ndarray, bins: int = BINS) -> Bins:
    """Mean probability and share of positives in each bin."""
    scores, labels = checked(scores_NF, labels_NF)
    findings = labels.shape[1]
    known = labels != UNKNOWN
    bin_index = np.minimum((scores * bins).astype(int), bins - 1) + bins * np.arange(findings)

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(bin_index[known], values[known], minlength=findings * bins).reshape(findings, bins)

    counts = summed(np.ones_like(scores))
    observed = ratio(summed((labels == POSITIVE).astype(float)), counts)
    return Bins(counts.astype(int), ratio(summed(scores), counts), observed)


def calibration_error(scores_NF: np.ndarray, labels_NF: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(F,) expected calibration error; NaN without a known label.

    The mean over images of |mean probability − share of positives| in the image's bin, with bins of equal width in
    the probability *of the finding* (Naeini et al. 2015). Guo et al. (2017) bin the confidence in the likelier class
    instead.
    """
    curve = reliability(scores_NF, labels_NF, bins)
    apart = np.where(curve.counts > 0, curve.counts * np.abs(curve.probability - curve.observed), 0)
    return ratio(apart.sum(1), curve.counts.sum(1))
