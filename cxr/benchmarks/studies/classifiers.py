"""Classifiers compared by their scores of the same test images: mean AUROC, with intervals by patient and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxr.benchmarks.studies.seed_results import SeedMean, SeedResults, finite
from cxr.errors import UserError
from cxr.evaluation import classification_data
from cxr.evaluation.classification_data import LabeledScores, LabelTruth
from cxr.evaluation.run import Run
from cxr.metrics.bootstrap import RESAMPLES, column_means
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.reporting import palette
from cxr.reporting.tables import csv_text, markdown, number

LEGEND = (
    f"Intervals are 95 % percentile intervals of {RESAMPLES:,} resamples of patients, with all of their images, and "
    "of seeds; differences are of the same patients and seeds. With few seeds, such intervals are somewhat narrow. "
    "A finding without both classes in the test images is left out.\n"
)


def joined(runs: Mapping[str, Sequence[Run]], truth: LabelTruth) -> dict[str, list[LabeledScores]]:
    """Scores with labels of the images that all runs have scored, for findings with both classes among them.

    Raises:
        UserError: there are no such images or findings.
    """
    scores = {
        name: [classification_data.join(classification_data.load_scores(run), truth) for run in of]
        for name, of in runs.items()
    }
    every = [each for of in scores.values() for each in of]
    rows = reduce(np.intersect1d, [each.rows for each in every])
    if not len(rows):
        raise UserError("expected test images that all networks have scored, got none: score them again")
    labels = every[0].at(rows, every[0].findings).labels
    both = np.isfinite(auroc(np.zeros(labels.shape), labels))
    findings = [finding for finding, measured in zip(every[0].findings, both.tolist(), strict=True) if measured]
    if not findings:
        raise UserError("expected a finding with positive and negative test images, got none: use more images")
    return {name: [each.at(rows, findings) for each in of] for name, of in scores.items()}


def result(name: str, networks: Sequence[LabeledScores], *, by_seed: bool = True, seed: int = 0) -> SeedResults:
    """The AUROCs of networks. Results can be compared only if they are of the same images and `seed`."""
    resamples = [
        column_means(resampled_aurocs(of.probabilities, of.labels, of.patients, RESAMPLES, seed).T) for of in networks
    ]
    values = np.stack([auroc(of.probabilities, of.labels) for of in networks])
    return SeedResults(name, networks[0].findings, values, np.stack(resamples), by_seed)


def averaged(networks: Sequence[LabeledScores]) -> LabeledScores:
    """The mean of the probabilities of several networks."""
    return replace(networks[0], probabilities=np.mean([of.probabilities for of in networks], axis=0))


def table(results: Sequence[SeedResults], title: str) -> str:
    """Markdown: one row per result, all compared with the first."""
    head = [title, "mean AUROC (95 %)", "SD over seeds", f"minus {results[0].name} (95 %)"]
    rows = []
    for each in results:
        mean = each.mean()
        gain = "–" if each is results[0] else each.gain(results[0]).cell()
        rows.append([each.name, mean.cell(), number(mean.sd), gain])
    return markdown(head, rows)


def csv(results: Sequence[SeedResults]) -> str:
    """The `rows` as a CSV file."""
    return csv_text(rows(results))


def rows(results: Sequence[SeedResults]) -> list[dict[str, Any]]:
    """One row per result and finding; the mean over findings is one of them."""
    found = list[dict[str, Any]]()
    for each in results:
        mean, gain = each.mean(), each.gain(results[0])
        of_mean = {"low": mean.low, "high": mean.high, "sd": mean.sd}
        compared = {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        found.append({"name": each.name, "finding": "mean", "auroc": mean.value, **of_mean, **compared})
        nothing = dict.fromkeys((*of_mean, *compared))
        for finding, value in zip(each.findings, each.values.mean(0).tolist(), strict=True):
            found.append({"name": each.name, "finding": finding, "auroc": value, **nothing})
    return found


def metrics(results: Sequence[SeedResults]) -> dict[str, float]:
    """Finite metrics by name: NAME/mean_auroc and NAME/gain, with _low, _high and _sd."""
    means = dict[str, SeedMean]()
    for each in results:
        means |= {f"{each.name}/mean_auroc": each.mean(), f"{each.name}/gain": each.gain(results[0])}
    return finite(means)


def picture(results: Sequence[SeedResults]) -> Figure:
    """Two panels: mean AUROC with its interval and one dot per seed, and the difference from the first result."""
    figure = Figure(figsize=(9, 0.34 * len(results) + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, each in enumerate(reversed(results)):
        intervals = [(left, each.mean())] + [(right, each.gain(results[0]))] * (each is not results[0])
        for axes, of in intervals:
            axes.plot([of.low, of.high], [row] * 2, color=palette.MODEL, lw=2, alpha=0.5, solid_capstyle="butt")
            axes.plot([of.value], [row], "|", color="black", ms=12, mew=2)
        left.plot(each.values.mean(1), [row] * len(each.values), "o", color=palette.MODEL, ms=4, alpha=0.6)
    right.axvline(0, color=palette.NEUTRAL, ls="--", lw=1)
    left.set_yticks(range(len(results)), [each.name for each in reversed(results)], fontsize=9)
    left.set_ylim(-0.6, len(results) - 0.4)
    titles = (left, "mean AUROC (95 %); dots: seeds"), (right, f"minus {results[0].name} (95 %)")
    for axes, title in titles:
        axes.set_title(title, loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color=palette.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
