"""A metric of several networks on the same test images, with intervals over resampled patients and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.benchmarks.studies.localization import SeedMean, mean_over_seeds


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
