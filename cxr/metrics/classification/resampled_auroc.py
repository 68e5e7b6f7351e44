"""AUROC in each resample of patients, computed from a single sort of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES, Intervals, intervals, ratio, resample
from cxr.metrics.classification.ranking import auroc, checked
from cxr.schema import NEGATIVE, POSITIVE


def auroc_intervals(
    scores_NF: np.ndarray, labels_NF: np.ndarray, patients_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Intervals:
    """AUROCs with their intervals; NaN for a finding without both classes.

    Args:
        patients_N: one id per image, of any sortable type; images of a patient are resampled together.
    """
    sampled = resampled_aurocs(scores_NF, labels_NF, patients_N, resamples, seed)
    return intervals(auroc(scores_NF, labels_NF), sampled)


def paired_gain(
    scores_NF: np.ndarray,
    others_NF: np.ndarray,
    labels_NF: np.ndarray,
    patients_N: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """AUROC of `scores` minus that of `others`, the scores of two models on the same images and the same
    resamples."""
    sampled, sampled_baseline = (
        resampled_aurocs(s, labels_NF, patients_N, resamples, seed) for s in (scores_NF, others_NF)
    )
    return intervals(auroc(scores_NF, labels_NF) - auroc(others_NF, labels_NF), sampled - sampled_baseline)


def resampled_aurocs(
    scores_NF: np.ndarray, labels_NF: np.ndarray, patients_N: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """(R, F) the AUROC in each resample, NaN without both classes. The resamples depend only on patients and seed."""
    scores, labels = checked(scores_NF, labels_NF)
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)
    if len(patients) != len(labels):
        raise ValueError(f"expected one patient id per image, got {len(patients)} for {len(labels)} images")
    findings = [_Finding.of(scores[:, f], labels[:, f], patients) for f in range(labels.shape[1])]
    if not findings or not len(ids):
        return np.full((resamples, len(findings)), np.nan)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        return np.stack([finding.aurocs(times_PR) for finding in findings], 1)

    return resample(len(ids), resamples, seed, measure, rows=len(labels))


@dataclass(frozen=True)
class _Finding:
    """One finding, sorted once: the patients of its images, and the number of negatives below each positive."""

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
        """(R,) AUROC if each patient's images count as often as the patient was sampled."""
        positive, negative = times_PR[self.positives_p], times_PR[self.negatives_n]
        counts = np.zeros((len(negative) + 1, times_PR.shape[1]), np.int32)
        np.cumsum(negative, axis=0, out=counts[1:])
        outranked = counts[self.below_p].astype(np.float64) + counts[self.up_to_p]
        return ratio(np.einsum("pr,pr->r", positive, outranked) / 2, positive.sum(0) * counts[-1].astype(np.float64))
