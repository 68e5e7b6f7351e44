"""Tables of networks that localize findings, with values from papers, and curves of accuracy by threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from cxr.benchmarks.studies.localization import LARGE, SMALL, LocalizationResult, accuracy
from cxr.benchmarks.studies.seed_results import SeedMean, mean_over_seeds
from cxr.metrics.localization import MEASURES, THRESHOLDS
from cxr.reporting import palette
from cxr.reporting.localization import NAMED, tidy
from cxr.reporting.tables import csv_text, markdown, number

_SHOWN = (("iou", 0.1), ("iou", 0.3), ("iou", 0.5), ("iobb", 0.1), ("iobb", 0.5))
_GUESSES = {"random": ":", "center": "--"}
_LEGEND = (
    "A finding with a ground-truth box in an image counts as localized if one of its predicted boxes, with any "
    "score, has an IoU (or an intersection over the predicted box, IoBB) above T with a ground-truth box (Wang et "
    "al. 2017). Values are means over seeds; 95 % intervals are percentile intervals of {resamples:,} resamples of "
    "patients (with all of their images) and of seeds. With few seeds, such intervals are somewhat too narrow; for "
    "a finding with a box in only a few images, they are far too narrow, as is that of a mean over such findings. "
    "`random` predicts one box per image and finding, with the size of a training box and at a random position; "
    "`center` predicts the mean box of the training images. False positives are predicted boxes per image that do "
    "not exceed T(IoU) = .3, averaged over findings.\n"
)
# As quoted in later papers: ChestX-ray14, no boxes in training, mean of its eight findings with boxes.
_PAPERS = (
    ("CAM (Zhou et al. 2016)", ".56", ".36", ".21", ".12", ".07"),
    ("Grad-CAM++ (Chattopadhay et al. 2018)", ".62", ".42", ".28", ".18", ".10"),
    ("PCAN", ".78", ".57", ".36", ".21", ".10"),
    ("CLARiTy", ".81", ".69", ".59", ".47", ".32"),
    ("random", ".29", ".17", ".10", ".05", ".03"),
)
_PAPERS_SAID = (
    "On ChestX-ray14's 984 boxes, without boxes in training, papers report this mean accuracy at T(IoU):\n\n"
    "{table}\nUnless the archive is ChestX-ray14, images and findings differ: these values are only for "
    "orientation.\n"
)


def tables(results: Sequence[LocalizationResult]) -> str:
    """Markdown: for each threshold a table with one row per network and one column per finding; then AUROC and the
    rest."""
    parts = []
    for measure, at in _SHOWN:
        head = [f"T({NAMED[measure]}) = {at:.1f}", *results[0].findings, "mean"]
        rows = [
            [
                result.name,
                *(
                    accuracy(result, measure, at, of).cell(2)
                    for of in (*([f] for f in result.findings), result.findings)
                ),
            ]
            for result in results
        ]
        parts.append(markdown(head, rows))
    return "\n".join([*parts, _others(results)])


def _others(results: Sequence[LocalizationResult]) -> str:
    head = ["", "mean AUROC (95 %)", "SD over seeds", "pointing game", "false positives per image"]
    at = THRESHOLDS.index(0.3)
    rows = [
        [
            result.name,
            (auroc := mean_over_seeds(result.aurocs, result.auroc_resamples)).cell(),
            number(auroc.sd),
            number(float(result.pointing.mean()), 2),
            number(float(result.false_positives["iou"][:, :, at].mean()), 2),
        ]
        for result in results
    ]
    return markdown(head, rows)


def gains_table(
    gains: Mapping[str, SeedMean], findings: Sequence[str], result: str, baseline: str, threshold: float = 0.3
) -> str:
    """Markdown: the gains of `studies.localization.gains` in these findings with boxes."""
    rows = [[_gain_title(name, findings, threshold), gain.cell(), number(gain.sd)] for name, gain in gains.items()]
    return markdown(["", f"{result} minus {baseline} (95 %)", "SD over seeds"], rows)


def _gain_title(name: str, findings: Sequence[str], threshold: float) -> str:
    group = {"small": SMALL, "large": LARGE}.get(name.partition("_")[0])
    if group is None:
        return "mean AUROC"
    present = [finding for finding in group if finding in findings]
    return f"T(IoU) = {threshold:.1f}, {'mean of ' * (len(present) > 1)}{' and '.join(present)}"


def seeds_table(results: Sequence[LocalizationResult], threshold: float = 0.3) -> str:
    """Markdown: for each trained network, its accuracies at a threshold on IoU and its mean AUROC."""
    findings = results[0].findings
    rows = []
    for result in results:
        if result.is_baseline:
            continue
        accuracies_FS = [result.at("iou", threshold, [finding])[0] for finding in findings]
        for seed, auroc in enumerate(result.aurocs):
            values = [number(float(of_S[seed]), 2) for of_S in accuracies_FS]
            rows.append([result.name, str(seed), *values, number(float(auroc))])
    return markdown([f"T(IoU) = {threshold:.1f}", "seed", *findings, "mean AUROC"], rows)


def page(results: Sequence[LocalizationResult], gained: str, summary: str, resamples: int) -> str:
    """The tables with their legend and values from papers, in Markdown.

    Args:
        gained: the table of gains, or an empty string.
        summary: which images and seeds were used.
    """
    papers = markdown(["", *(f"{at:.1f}" for at in THRESHOLDS[:5])], _PAPERS)
    legend = _LEGEND.format(resamples=resamples)
    parts = [tables(results), gained, seeds_table(results), f"{summary}\n", legend, _PAPERS_SAID.format(table=papers)]
    return "\n".join(parts)


def csv(results: Sequence[LocalizationResult]) -> str:
    """One row per network, finding, measure and threshold; the mean over findings is one of them."""
    return csv_text([row for result in results for row in _rows(result)])


def _rows(result: LocalizationResult) -> list[dict[str, Any]]:
    groups = {**{finding: [finding] for finding in result.findings}, "mean": list(result.findings)}
    rows = []
    for measure, (t, at), (name, of) in (
        (m, t, g) for m in MEASURES for t in enumerate(THRESHOLDS) for g in groups.items()
    ):
        figure = accuracy(result, measure, at, of)
        places = [result.findings.index(finding) for finding in of]
        rows.append(
            {"network": result.name, "measure": measure, "threshold": at, "finding": name}
            | {"accuracy": figure.value, "low": figure.low, "high": figure.high, "sd": figure.sd}
            | {"false_positives": float(result.false_positives[measure][:, places, t].mean())}
        )
    return rows


def picture(results: Sequence[LocalizationResult]) -> Figure:
    """Accuracy against the threshold on IoU: one panel per finding, one line per network with its interval, one dot
    per seed."""
    panels = [[finding] for finding in results[0].findings] + [list(results[0].findings)]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).reshape(-1)
    for axes, of in zip(grid, panels, strict=False):
        for row, result in enumerate(results):
            _curve(axes, result, of, palette.series(row))
        tidy(axes, "iou")
        axes.set_title(of[0] if len(of) == 1 else "mean over findings", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(results), frameon=False)
    for axes in grid[::columns]:
        axes.set_ylabel("fraction of images with it, localized", fontsize=9)
    return figure


def _curve(axes: Any, result: LocalizationResult, findings: Sequence[str], color: str) -> None:
    seen = [accuracy(result, "iou", at, findings) for at in THRESHOLDS]
    style = {"color": "0.5", "ls": _GUESSES.get(result.name, "--")} if result.is_baseline else {"color": color}
    axes.plot(THRESHOLDS, [of.value for of in seen], lw=1.6, label=result.name, **style)
    if not result.is_baseline:
        axes.fill_between(
            THRESHOLDS, [of.low for of in seen], [of.high for of in seen], color=color, alpha=0.12, lw=0
        )
        for at in THRESHOLDS:
            own, _ = result.at("iou", at, findings)
            axes.plot([at] * len(own), own, ".", color=color, ms=4, alpha=0.6)
