"""A metric of several networks on the same test images, with intervals over resampled patients and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

from cxr.errors import UserError
from cxr.metrics.bootstrap import ENDS, MeanInterval
from cxr.reporting.tables import interval


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, its 95 % interval over resampled patients and seeds, and the SD of the seeds."""

    value: float
    low: float
    high: float
    sd: float

    def cell(self, digits: int = 3) -> str:
        """The mean with its interval, for a table."""
        return interval(self.value, self.low, self.high, digits)

    @property
    def mean_interval(self) -> MeanInterval:
        """The mean and its interval alone."""
        return MeanInterval(self.value, self.low, self.high)

    def named(self, name: str) -> dict[str, float]:
        """NAME, NAME_low, NAME_high and NAME_sd."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_sd": self.sd}


def rows_in_common(scored: Iterable[np.ndarray]) -> np.ndarray:
    """The rows of the test images that all networks have scored, from those that each has scored.

    Raises:
        UserError: there are none.
    """
    rows = reduce(np.intersect1d, scored)
    if not len(rows):
        raise UserError("expected test images that all networks have scored, got none: score them again")
    return rows


def mean_over_seeds(values_S: np.ndarray, resamples_SR: np.ndarray, seed: int = 0) -> SeedMean:
    """The mean over seeds; the interval resamples both seeds and patients."""
    seeds, resamples = resamples_SR.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=resamples_SR.shape)
    means = resamples_SR[chosen, np.arange(resamples)].mean(0)
    finite = means[np.isfinite(means)]
    low, high = np.quantile(finite, ENDS) if len(finite) else (math.nan, math.nan)
    sd = float(values_S.std(ddof=1)) if seeds > 1 else math.nan
    return SeedMean(float(values_S.mean()), float(low), float(high), sd)


def finite(means: Mapping[str, SeedMean]) -> dict[str, float]:
    """The metrics `SeedMean.named` of all means, without NaN."""
    values = {key: value for name, mean in means.items() for key, value in mean.named(name).items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass(frozen=True)
class SeedResults:
    """The metric of S networks or ensembles for F findings."""

    name: str
    findings: tuple[str, ...]
    values: np.ndarray  # (S, F)
    resamples: np.ndarray  # (S, R) the mean over findings in each resample of patients
    by_seed: bool = True  # the S networks have different seeds, which intervals resample

    def mean(self) -> SeedMean:
        """The mean over findings and networks."""
        return _mean(self.values.mean(1), self.resamples, by_seed=self.by_seed)

    def gain(self, baseline: SeedResults) -> SeedMean:
        """The mean minus that of the baseline, on the same resamples, and on the same seeds if both have them."""
        own, other = (self.values.mean(1), self.resamples), (baseline.values.mean(1), baseline.resamples)
        if self.by_seed and baseline.by_seed:
            return _mean(own[0] - other[0], own[1] - other[1], by_seed=True)
        return _mean(own[0].mean(keepdims=True) - other[0].mean(), own[1].mean(0)[None] - other[1].mean(0))


def _mean(values_S: np.ndarray, resamples_SR: np.ndarray, *, by_seed: bool = False) -> SeedMean:
    """See `mean_over_seeds`; unless `by_seed`, only patients are resampled, and the networks are fixed."""
    if by_seed:
        return mean_over_seeds(values_S, resamples_SR)
    return mean_over_seeds(values_S.mean(keepdims=True), resamples_SR.mean(0, keepdims=True))
