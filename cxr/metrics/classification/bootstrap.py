"""How sure AUROCs are: 95 % intervals by drawing patients, with all of their images, anew with replacement."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cxr.metrics.classification.ranking import auroc, checked, divided
from cxr.schema import NEGATIVE, POSITIVE

RESAMPLES = 1000
LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_BLOCK = 64  # resamples that are counted at once


@dataclass(frozen=True)
class Intervals:
    """A figure per finding and its mean over the findings that can be measured, with 95 % percentile intervals.

    A resample in which a finding has lost a class is left out for it. The mean of a resample is that over the
    findings which it can measure.
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


def auroc_intervals(
    scores_NF: np.ndarray, labels_NF: np.ndarray, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Intervals:
    """AUROCs with their intervals; NaN for a finding without both classes.

    Args:
        patients_N: an id an image, of any type that sorts; images of a patient are drawn together.
    """
    drawn = resampled_aurocs(scores_NF, labels_NF, patients_N, resamples, seed)
    return intervals(auroc(scores_NF, labels_NF), drawn)


def paired_gain(
    scores_NF: np.ndarray,
    others_NF: np.ndarray,
    labels_NF: np.ndarray,
    patients_N: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """AUROC of `scores` minus that of `others`, two models on the same images, both on the same resamples."""
    one, other = (resampled_aurocs(s, labels_NF, patients_N, resamples, seed) for s in (scores_NF, others_NF))
    return intervals(auroc(scores_NF, labels_NF) - auroc(others_NF, labels_NF), one - other)


def intervals(value_F: np.ndarray, drawn_RF: np.ndarray) -> Intervals:
    """Of figures by finding and of what they are in each resample, NaN where one cannot be measured."""
    measurable = np.isfinite(value_F)
    lost = np.isnan(drawn_RF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of columns and rows that are NaN throughout
        low, high = np.nanquantile(drawn_RF, ENDS, axis=0)
        means = np.nanmean(drawn_RF, axis=1)
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
        resamples=len(drawn_RF),
    )


def resampled_aurocs(
    scores_NF: np.ndarray, labels_NF: np.ndarray, patients_N: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """(R, F) the AUROC in each resample, NaN where a class is missing. The draws hang on patients and seed alone."""
    scores, labels = checked(scores_NF, labels_NF)
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    if len(patients) != len(labels):
        raise ValueError(f"{len(patients)} patients of {len(labels)} images: wanted an id an image")
    findings = [_Finding.of(scores[:, f], labels[:, f], patients) for f in range(labels.shape[1])]
    found = np.full((resamples, len(findings)), np.nan)
    for block, times in enumerate(draws(len(ids), resamples, seed)):
        for column, finding in enumerate(findings):
            found[block * _BLOCK : (block + 1) * _BLOCK, column] = finding.aurocs(times)
    return found


def draws(patients: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of resamples, (P, r) int32: how many times each patient is drawn. They hang on the arguments alone."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples if patients else 0, _BLOCK):
        yield _draw(rng, patients, min(_BLOCK, resamples - start))


def _draw(rng: np.random.Generator, patients: int, resamples: int) -> np.ndarray:
    """(P, R) int32: how many times each patient is drawn."""
    drawn = rng.integers(patients, size=(resamples, patients)) + patients * np.arange(resamples)[:, None]
    times = np.bincount(drawn.reshape(-1), minlength=patients * resamples).reshape(resamples, patients)
    return np.ascontiguousarray(times.T, np.int32)


@dataclass(frozen=True)
class _Finding:
    """A finding sorted once: whose its images are, and how many negatives lie below each positive."""

    positives_p: np.ndarray  # patient of each positive
    negatives_n: np.ndarray  # patient of each negative, lowest score first
    below_p: np.ndarray  # negatives with a lower score than the positive
    up_to_p: np.ndarray  # negatives with a lower score or the same

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> _Finding:
        positive, negative = labels == POSITIVE, labels == NEGATIVE
        order = np.argsort(scores[negative], kind="stable")
        ranks = (np.searchsorted(scores[negative][order], scores[positive], side) for side in ("left", "right"))
        return cls(patients[positive], patients[negative][order], *ranks)

    def aurocs(self, times_PR: np.ndarray) -> np.ndarray:
        """(R,) AUROC where each patient's images count as often as the patient was drawn."""
        positive, negative = times_PR[self.positives_p], times_PR[self.negatives_n]
        counts = np.zeros((len(negative) + 1, times_PR.shape[1]), np.int32)
        np.cumsum(negative, axis=0, out=counts[1:])
        outranked = counts[self.below_p].astype(np.float64) + counts[self.up_to_p]
        return divided(
            np.einsum("pr,pr->r", positive, outranked) / 2, positive.sum(0) * counts[-1].astype(np.float64)
        )
