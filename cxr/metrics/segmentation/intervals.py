"""How sure a mean over images is: its 95 % interval by drawing patients, with all of their images, anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cxr.metrics.classification.bootstrap import ENDS, RESAMPLES
from cxr.metrics.classification.ranking import divided

_BLOCK = 64  # resamples that are counted at once


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values_N: np.ndarray, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> MeanInterval:
    """The mean of an image's figure over images, NaN left out.

    A patient is drawn with all images, so that one with more images weighs more. The draws hang on the patients
    and the seed alone: two models are compared by the interval of their images' differences.

    Args:
        patients_N: an id an image, of any type that sorts.
    """
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    known = np.isfinite(values_N)
    if not known.any():
        return MeanInterval(math.nan, math.nan, math.nan)
    totals = np.bincount(patients[known], values_N[known], len(ids))
    counts = np.bincount(patients[known], minlength=len(ids)).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = [
        _means(rng.integers(len(ids), size=(min(_BLOCK, resamples - start), len(ids))), totals, counts)
        for start in range(0, resamples, _BLOCK)
    ]
    means = np.concatenate(drawn)
    means = means[np.isfinite(means)]
    low, high = np.quantile(means, ENDS) if len(means) else (math.nan, math.nan)
    return MeanInterval(float(values_N[known].mean()), float(low), float(high))


def _means(drawn_RP: np.ndarray, totals_P: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
    """(R,) mean over the images of the patients drawn; NaN where none of them has a known figure."""
    return divided(totals_P[drawn_RP].sum(1), counts_P[drawn_RP].sum(1))
