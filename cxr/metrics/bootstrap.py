"""Confidence intervals by the bootstrap over patients: a patient is resampled with all of their images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
BLOCK = 64  # number of resamples that are computed at a time


@dataclass(frozen=True)
class Intervals:
    """A metric of each finding, and its mean over findings, with 95 % percentile intervals.

    A resample in which a finding cannot be measured is left out for that finding. The mean of a resample is over the
    findings that it can measure.
    """

    value: np.ndarray  # this and the next three: (F,)
    low: np.ndarray
    high: np.ndarray
    left_out: np.ndarray  # resamples
    mean: float
    mean_low: float
    mean_high: float
    mean_incomplete: int  # resamples whose mean lacks a finding
    resamples: int

    @property
    def over_findings(self) -> MeanInterval:
        """The mean over findings with its interval."""
        return MeanInterval(self.mean, self.mean_low, self.mean_high)

    def by_finding(self, findings: Sequence[str]) -> dict[str, MeanInterval]:
        """The metric of each finding with its interval."""
        columns = (values.tolist() for values in (self.value, self.low, self.high))
        return {finding: MeanInterval(*row) for finding, *row in zip(findings, *columns, strict=True)}


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def resamples_of(patients: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of resamples, (P, r) int32: how often each patient is sampled. They depend only on the arguments."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples if patients else 0, BLOCK):
        yield _resample(rng, patients, min(BLOCK, resamples - start))


def _resample(rng: np.random.Generator, patients: int, resamples: int) -> np.ndarray:
    """(P, R) int32: how often each patient is sampled."""
    sampled = rng.integers(patients, size=(resamples, patients)) + patients * np.arange(resamples)[:, None]
    times = np.bincount(sampled.reshape(-1), minlength=patients * resamples).reshape(resamples, patients)
    return np.ascontiguousarray(times.T, np.int32)


def intervals(value_F: np.ndarray, resampled_RF: np.ndarray) -> Intervals:
    """From the metric of each finding and its values in each resample; NaN for values that cannot be measured."""
    measurable = np.isfinite(value_F)
    lost = np.isnan(resampled_RF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns and rows that are all NaN
        low, high = np.nanquantile(resampled_RF, ENDS, axis=0)
        means = np.nanmean(resampled_RF, axis=1)
        mean_low, mean_high = np.nanquantile(means, ENDS)
    return Intervals(
        value=value_F,
        low=low,
        high=high,
        left_out=lost.sum(0),
        mean=float(value_F[measurable].mean()) if measurable.any() else float("nan"),
        mean_low=float(mean_low),
        mean_high=float(mean_high),
        mean_incomplete=int(lost[:, measurable].any(1).sum()),
        resamples=len(resampled_RF),
    )


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise numerator / denominator in float64, NaN where the denominator is 0."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def column_means(values_NK: np.ndarray) -> np.ndarray:
    """(K,) mean of each column over its known values; NaN for a column without any."""
    known = np.isfinite(values_NK)
    return ratio(np.where(known, values_NK, 0).sum(0), known.sum(0))


def resampled_means(values_NK: np.ndarray, patients_N: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(R, K) `column_means` in each resample of patients; NaN for columns without known values.

    Args:
        patients_N: one id per image, of any sortable type.
    """
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    known = np.isfinite(values_NK)
    informative = np.flatnonzero(np.bincount(patients, known.any(1), len(ids)))  # patients with a known value
    position = np.full(len(ids), -1)
    position[informative] = np.arange(len(informative))
    rows = position[patients] >= 0
    totals, numbers = np.zeros((2, len(informative), values_NK.shape[1]))
    np.add.at(totals, position[patients[rows]], np.where(known, values_NK, 0)[rows])
    np.add.at(numbers, position[patients[rows]], known[rows])
    means = [
        ratio(times.T @ totals, times.T @ numbers)
        for times in (block[informative].astype(np.float64) for block in resamples_of(len(ids), resamples, seed))
    ]
    return np.concatenate(means) if means else np.full((resamples, values_NK.shape[1]), np.nan)


def mean_interval(
    values_N: np.ndarray, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> MeanInterval:
    """The mean of a metric over images, ignoring NaN. Patients with more images have more weight.

    The resamples depend only on patients and seed: compare two models by the interval of the differences of their
    images.
    """
    values_N1 = np.asarray(values_N)[:, None]
    means = resampled_means(values_N1, patients_N, resamples, seed)
    means = means[np.isfinite(means)]
    low, high = np.quantile(means, ENDS) if len(means) else (math.nan, math.nan)
    return MeanInterval(float(column_means(values_N1)[0]), float(low), float(high))
