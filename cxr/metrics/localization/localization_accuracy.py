"""Shares of right pairs and numbers of wrong boxes, by finding and threshold, with intervals by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES, Intervals, column_means, intervals, resampled_means
from cxr.metrics.localization.box_overlap import MEASURES, THRESHOLDS, Located

ByThreshold = dict[str, tuple[Intervals, ...]]  # measure -> one an entry of THRESHOLDS


@dataclass(frozen=True)
class LocalizationRates:
    """How boxes were predicted; every `Intervals` has a figure a finding, and their mean."""

    findings: tuple[str, ...]
    pairs: np.ndarray  # (F,) images with a true box of the finding
    patients: np.ndarray  # (F,) of these
    images: np.ndarray  # (F,) of which it is known whether and where they show it
    accuracy: ByThreshold  # share of the pairs that a predicted box passes
    wrong: ByThreshold  # predicted boxes that do not pass, an image
    pointing: Intervals  # share of the pairs in which the best box's center lies in a true box

    def at(self, measure: str, threshold: float) -> Intervals:
        """The accuracy at one threshold."""
        return self.accuracy[measure][THRESHOLDS.index(threshold)]


def summarize(
    located: Located,
    patients_N: np.ndarray,
    findings: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LocalizationRates:
    """All figures of a set of images.

    Args:
        patients_N: an id an image, of any type that sorts; images of a patient are drawn together.
    """

    def sure(values_of: Callable[[str, float], np.ndarray]) -> ByThreshold:
        return {
            name: _together([values_of(name, at) for at in THRESHOLDS], patients_N, resamples, seed)
            for name in MEASURES
        }

    boxed = np.isfinite(located.pointed)
    return LocalizationRates(
        findings=tuple(findings),
        pairs=boxed.sum(0),
        patients=np.array([len(np.unique(np.asarray(patients_N)[column])) for column in boxed.T]),
        images=located.known.sum(0),
        accuracy=sure(located.right),
        wrong=sure(located.wrong),
        pointing=_together([located.pointed], patients_N, resamples, seed)[0],
    )


def paired_gain(
    located: Located, other: Located, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> ByThreshold:
    """Accuracy minus that of another way to find boxes on the same images, both on the same resamples."""
    return {
        name: tuple(
            intervals(
                column_means(ours) - column_means(theirs),
                resampled_means(ours, patients_N, resamples, seed)
                - resampled_means(theirs, patients_N, resamples, seed),
            )
            for ours, theirs in ((located.right(name, at), other.right(name, at)) for at in THRESHOLDS)
        )
        for name in MEASURES
    }


def _together(
    values: Sequence[np.ndarray], patients_N: np.ndarray, resamples: int, seed: int
) -> tuple[Intervals, ...]:
    """Intervals of several figures (N, F), all on the same resamples."""
    drawn = np.split(
        resampled_means(np.concatenate(values, axis=1), patients_N, resamples, seed), len(values), axis=1
    )
    return tuple(intervals(column_means(one), part) for one, part in zip(values, drawn, strict=True))
