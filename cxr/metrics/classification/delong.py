"""DeLong's test of two correlated AUROCs: two models on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cxr.metrics.classification.ranking import checked
from cxr.schema import NEGATIVE, POSITIVE

_Z = 1.959963984540054  # quantile of a two-sided 95 % interval
_ROUNDING = 1e-12  # standard errors up to this are rounding errors


@dataclass(frozen=True)
class DeLong:
    """Per finding, each (F,); NaN for values that cannot be computed."""

    auroc: np.ndarray
    other: np.ndarray
    difference: np.ndarray  # auroc − other
    low: np.ndarray  # 95 % interval of the difference
    high: np.ndarray
    p: np.ndarray  # two-sided p value of no difference


def delong(scores_NF: np.ndarray, others_NF: np.ndarray, labels_NF: np.ndarray) -> DeLong:
    """Compare two models on the same images (DeLong et al. 1988), computed from ranks as in Sun & Xu (2014).

    Images are treated as independent: if patients have several, use `resampled_auroc.paired_gain`. A finding with
    fewer than two positives or two negatives has no interval, and neither has one for which the variance of the
    difference is 0 (for example, if both models are perfect). If both rank all images equally, p is 1.
    """
    scores, labels = checked(scores_NF, labels_NF)
    baseline, _ = checked(others_NF, labels_NF)
    columns = [_finding(scores[:, f], baseline[:, f], labels[:, f]) for f in range(labels.shape[1])]
    return DeLong(*np.array(columns, np.float64).reshape(-1, 6).T)


def _finding(scores: np.ndarray, baseline: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    positive, negative = labels == POSITIVE, labels == NEGATIVE
    if not positive.any() or not negative.any():
        return (math.nan,) * 6
    wins, losses = _placements(scores[positive], scores[negative])
    wins_other, losses_other = _placements(baseline[positive], baseline[negative])
    area, other = wins.mean(), wins_other.mean()
    error = _standard_error(wins - wins_other, losses - losses_other)
    difference = area - other
    if math.isnan(error):
        return area, other, difference, math.nan, math.nan, math.nan
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else 1.0
    return area, other, difference, difference - _Z * error, difference + _Z * error, p


def _placements(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive, the share of negatives below it; for each negative, the share of positives above it; ties
    count half."""
    return _share_below(positive, negative), 1 - _share_below(negative, positive)


def _share_below(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    ordered = np.sort(thresholds)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (
        2 * len(thresholds)
    )


def _standard_error(wins: np.ndarray, losses: np.ndarray) -> float:
    """Standard error of the difference, from the variances of the placements; NaN if there is none."""
    if len(wins) < 2 or len(losses) < 2:
        return math.nan
    error = math.sqrt(wins.var(ddof=1) / len(wins) + losses.var(ddof=1) / len(losses))
    if error > _ROUNDING:
        return error
    return math.nan if wins.any() or losses.any() else 0.0
