"""Classifiers compared on one test split: mean AUROCs of several seeds, intervals by patient, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from cxr.evaluation.classification_data import LabeledScores
from cxr.metrics.bootstrap import ENDS, RESAMPLES
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.reporting import palette


@dataclass(frozen=True)
class ClassificationResult:
    """Results of the networks of one recipe, one per seed, on the test split."""

    name: str
    aurocs: np.ndarray  # (S,) mean AUROC over findings of each seed
    resampled: np.ndarray  # (R,) the mean over seeds, in each resample of patients

    @property
    def mean(self) -> float:
        return float(self.aurocs.mean())

    def sd(self) -> float:
        """Standard deviation over seeds."""
        return float(self.aurocs.std(ddof=1)) if len(self.aurocs) > 1 else float("nan")

    def ends(self) -> tuple[float, float]:
        """95 % interval of the mean over seeds, from resampled patients."""
        low, high = np.nanquantile(self.resampled, ENDS)
        return float(low), float(high)

    def minus(self, baseline: ClassificationResult) -> tuple[float, float, float]:
        """Mean AUROC minus that of the baseline, and its 95 % interval over the same resampled patients."""
        low, high = np.nanquantile(self.resampled - baseline.resampled, ENDS)
        return self.mean - baseline.mean, float(low), float(high)


def summarize(name: str, networks: Sequence[LabeledScores], seed: int = 0) -> ClassificationResult:
    """The results of the networks of one recipe, one per seed. Recipes can be compared only with the same `seed`, on
    the same images."""
    aurocs = [np.nanmean(auroc(of.probabilities, of.labels)) for of in networks]
    resampled = [
        np.nanmean(resampled_aurocs(of.probabilities, of.labels, of.patients, RESAMPLES, seed), axis=1)
        for of in networks
    ]
    return ClassificationResult(name, np.array(aurocs), np.mean(resampled, axis=0))


def picture(results: Sequence[ClassificationResult]) -> Figure:
    """Mean AUROC of each recipe with its interval, and one dot per seed."""
    figure = Figure(figsize=(6.4, 0.6 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(reversed(results)):
        low, high = result.ends()
        axes.plot([low, high], [row, row], color=palette.MODEL, lw=2, solid_capstyle="butt")
        axes.plot(result.aurocs, [row] * len(result.aurocs), "o", color=palette.MODEL, alpha=0.6, mec="white")
        axes.plot([result.mean], [row], "|", color="black", ms=14, mew=2)
    axes.set_yticks(range(len(results)), [result.name for result in reversed(results)])
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlabel("mean AUROC on the test split\nline: 95 % by patient, dots: seeds, bar: their mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=palette.GRID)
    return figure
