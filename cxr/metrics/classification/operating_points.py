"""Sensitivity, specificity and predictive values of decisions, with intervals by patient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import ENDS, RESAMPLES, MeanInterval, ratio, resample
from cxr.schema import NEGATIVE, POSITIVE


@dataclass(frozen=True)
class OperatingPoint:
    """Decisions on one finding; shares are NaN if the denominator is 0."""

    true_positives: int  # images
    false_positives: int
    false_negatives: int
    true_negatives: int
    sensitivity: MeanInterval
    specificity: MeanInterval
    ppv: MeanInterval  # positive predictive value
    npv: MeanInterval  # negative predictive value


def operating_points(
    predicted_positive_NF: np.ndarray,
    labels_NF: np.ndarray,
    patients_N: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[OperatingPoint]:
    """The operating point of each finding, for decisions of 1 or True: positive. Unknown labels are ignored."""
    called, labels = np.asarray(predicted_positive_NF, bool), np.asarray(labels_NF)
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    positive, negative = labels == POSITIVE, labels == NEGATIVE
    cells = np.stack([called & positive, called & negative, ~called & positive, ~called & negative])  # (4, N, F)
    totals = np.zeros((len(ids), 4, labels.shape[1]))
    np.add.at(totals, patients, cells.transpose(1, 0, 2))
    counts_4F = totals.sum(0)
    whole_4F = _shares(counts_4F)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        counts_RK = times_PR.T.astype(np.float64) @ totals.reshape(len(ids), -1)
        return np.swapaxes(_shares(np.moveaxis(counts_RK.reshape(-1, *totals.shape[1:]), 1, 0)), 0, 1)

    sampled_R4F = (
        resample(len(ids), resamples, seed, measure) if len(ids) else np.full((0, 4, labels.shape[1]), np.nan)
    )
    points = []
    for f in range(labels.shape[1]):
        true_positives, false_positives, false_negatives, true_negatives = map(int, counts_4F[:, f])
        shares = [_interval(float(whole_4F[share, f]), sampled_R4F[:, share, f]) for share in range(4)]
        points.append(OperatingPoint(true_positives, false_positives, false_negatives, true_negatives, *shares))
    return points


def _shares(counts: np.ndarray) -> np.ndarray:
    """Sensitivity, specificity, PPV and NPV from the four counts, which are the first axis."""
    true_positive, false_positive, false_negative, true_negative = counts
    return np.stack(
        [
            ratio(true_positive, true_positive + false_negative),
            ratio(true_negative, true_negative + false_positive),
            ratio(true_positive, true_positive + false_positive),
            ratio(true_negative, true_negative + false_negative),
        ]
    )


def _interval(value: float, sampled_R: np.ndarray) -> MeanInterval:
    known = sampled_R[np.isfinite(sampled_R)]
    low, high = np.quantile(known, ENDS) if len(known) and not math.isnan(value) else (math.nan, math.nan)
    return MeanInterval(float(value), float(low), float(high))
