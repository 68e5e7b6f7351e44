"""Classifiers compared by their scores of the same test images: mean AUROC, with intervals by patient and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxr.benchmarks.studies.seed_results import SeedMean, SeedResults, finite, rows_in_common
from cxr.errors import UserError
from cxr.evaluation import classification_data
from cxr.evaluation.classification_data import LabeledScores, LabelTruth
from cxr.evaluation.run import Run
from cxr.metrics.bootstrap import RESAMPLES, column_means
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.reporting.forest import ForestLine, forest_figure
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
    rows = rows_in_common(each.rows for each in every)
    labels = every[0].at(rows, every[0].findings).labels
    both = np.isfinite(auroc(np.zeros(labels.shape), labels))
    findings = [finding for finding, measured in zip(every[0].findings, both.tolist(), strict=True) if measured]
    if not findings:
        raise UserError("expected a finding with positive and negative test images, got none: use more images")
    return {name: [each.at(rows, findings) for each in of] for name, of in scores.items()}


def result(name: str, networks: Sequence[LabeledScores], seed: int = 0) -> SeedResults:
    """The AUROCs of networks. Results can be compared only if they are of the same images and `seed`."""
    resamples = [
        column_means(resampled_aurocs(of.probabilities, of.labels, of.patients, RESAMPLES, seed).T) for of in networks
    ]
    values = np.stack([auroc(of.probabilities, of.labels) for of in networks])
    return SeedResults(name, networks[0].findings, values, np.stack(resamples))


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
    """Mean AUROC of each result with one dot per seed, and its difference from the first, both with intervals."""
    auroc_title, gain_title = "mean AUROC (95 %); dots: seeds", f"minus {results[0].name} (95 %)"
    lines = []
    for each in results:
        values = {auroc_title: each.mean().mean_interval}
        if each is not results[0]:
            values[gain_title] = each.gain(results[0]).mean_interval
        points = {auroc_title: each.values.mean(1).tolist()}
        lines.append(ForestLine(each.name, values, reference=each is results[0], points=points))
    return forest_figure(lines, [auroc_title, gain_title], differences=[gain_title])
