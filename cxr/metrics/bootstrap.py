"""Confidence intervals by the bootstrap over patients: a patient is resampled with all of their images.

Resamples are drawn and measured in threads, in blocks of limited memory. Each `_DRAWN_TOGETHER` of them have a random
generator of their own, so that results depend neither on the number of threads nor on the size of a block.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_DRAWN_TOGETHER = 16  # resamples that one random generator draws
_MOST_VALUES = 1 << 20  # patients or rows, times resamples, that a thread measures at a time
_HERE_AT_MOST = 1 << 22  # the same, below which threads are not worth starting


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


def resample(
    patients: int, resamples: int, seed: int, measure: Callable[[np.ndarray], np.ndarray], rows: int = 0
) -> np.ndarray:
    """(R, …) what is measured in each resample of patients; it depends only on the arguments.

    Args:
        patients: their number, at least 1.
        measure: takes (P, r) int32, how often each patient is in each of r resamples, and returns (r, …). It runs in
            several threads.
        rows: number of images or boxes for which `measure` needs memory, if there are more of them than patients.
    """
    size = max(1, patients, rows)
    of_some = partial(_resample_some, patients, resamples, seed, measure, max(1, _MOST_VALUES // size))
    starts = range(0, max(1, resamples), _DRAWN_TOGETHER)
    threads = min(len(starts), _cpus()) if size * resamples > _HERE_AT_MOST else 1
    if threads == 1:
        return np.concatenate([of_some(start) for start in starts])
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(of_some, starts)))


def _resample_some(
    patients: int, resamples: int, seed: int, measure: Callable[[np.ndarray], np.ndarray], block: int, start: int
) -> np.ndarray:
    """The resamples from `start` that one random generator draws, so many at a time."""
    rng = np.random.default_rng([seed, start])
    end = min(resamples, start + _DRAWN_TOGETHER)
    counts = [min(block, end - at) for at in range(start, end, block)] or [0]
    return np.concatenate([measure(_draw(rng, patients, count)) for count in counts])


def _draw(rng: np.random.Generator, patients: int, resamples: int) -> np.ndarray:
    """(P, R) int32: how often each patient is sampled."""
    sampled = rng.integers(patients, size=(resamples, patients)) + patients * np.arange(resamples)[:, None]
    times = np.bincount(sampled.reshape(-1), minlength=patients * resamples).reshape(resamples, patients)
    return np.ascontiguousarray(times.T, np.int32)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    if not len(informative):
        return np.full((resamples, values_NK.shape[1]), np.nan)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        times = times_PR[informative].T.astype(np.float64)
        return ratio(times @ totals, times @ numbers)

    return resample(len(ids), resamples, seed, measure)


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
