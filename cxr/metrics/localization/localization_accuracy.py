"""Localization accuracy and false positives by finding and threshold, with intervals by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES, Intervals, column_means, intervals, resampled_means
from cxr.metrics.localization.box_overlap import MEASURES, THRESHOLDS, Located

ByThreshold = dict[str, tuple[Intervals, ...]]  # measure -> one entry per threshold


@dataclass(frozen=True)
class LocalizationRates:
    """All localization metrics; every `Intervals` has a value per finding, and their mean."""

    findings: tuple[str, ...]
    pairs: np.ndarray  # (F,) images with a ground-truth box of the finding
    patients: np.ndarray  # (F,) patients of these images
    images: np.ndarray  # (F,) images in which all boxes of the finding are known
    accuracy: ByThreshold  # share of the pairs with a predicted box above the threshold
    false_positives: ByThreshold  # predicted boxes per image that are not above the threshold
    pointing: Intervals  # share of the pairs in which the center of the highest-scoring box is in a ground-truth box

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
    """All metrics of a set of images.

    Args:
        patients_N: one id per image, of any sortable type; images of a patient are resampled together.
    """

    def by_threshold(values_of: Callable[[str, float], np.ndarray]) -> ByThreshold:
        return {
            name: _joint_intervals([values_of(name, at) for at in THRESHOLDS], patients_N, resamples, seed)
            for name in MEASURES
        }

    boxed = np.isfinite(located.pointed)
    return LocalizationRates(
        findings=tuple(findings),
        pairs=boxed.sum(0),
        patients=np.array([len(np.unique(np.asarray(patients_N)[column])) for column in boxed.T]),
        images=located.known.sum(0),
        accuracy=by_threshold(located.localized),
        false_positives=by_threshold(located.false_positives),
        pointing=_joint_intervals([located.pointed], patients_N, resamples, seed)[0],
    )


def paired_gain(
    located: Located, baseline: Located, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> ByThreshold:
    """Accuracy minus that of another method on the same images and the same resamples."""
    return {
        name: tuple(
            intervals(
                column_means(ours) - column_means(theirs),
                resampled_means(ours, patients_N, resamples, seed)
                - resampled_means(theirs, patients_N, resamples, seed),
            )
            for ours, theirs in ((located.localized(name, at), baseline.localized(name, at)) for at in THRESHOLDS)
        )
        for name in MEASURES
    }


def _joint_intervals(
    values: Sequence[np.ndarray], patients_N: np.ndarray, resamples: int, seed: int
) -> tuple[Intervals, ...]:
    """Intervals of several metrics (N, F), all on the same resamples."""
    resampled = np.split(
        resampled_means(np.concatenate(values, axis=1), patients_N, resamples, seed), len(values), axis=1
    )
    return tuple(intervals(column_means(metric), part) for metric, part in zip(values, resampled, strict=True))
