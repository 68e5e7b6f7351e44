"""Tables and figures of a detector: average precision, curves, confusion matrix, distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cxr import storage
from cxr.metrics.classification.classification_summary import FEW
from cxr.metrics.detection import COCO_IOUS, FROC_RATES, VOC_IOUS, DetectionSummary
from cxr.reporting import palette
from cxr.reporting.tables import Table, csv_text, interval, number
from cxr.wording import counted

BACKGROUND = "background"
TRUTH, LABEL, PREDICTION = "ground truth", "label", "prediction"  # what counts and areas are of
_COLORS = {TRUTH: palette.TRUTH, LABEL: palette.TRUTH, PREDICTION: palette.PREDICTION}


def precision_table(summary: DetectionSummary) -> Table:
    """One row for each finding, and their means."""
    head = ["finding", *(f"AP at IoU > {iou:g} (95 %)" for iou in VOC_IOUS), "AP, COCO", "highest F1", "at score"]
    head += ["ground-truth boxes", "images with one", "predicted boxes", "note"]
    rows = [
        [
            finding,
            *(interval(of.value[f], of.low[f], of.high[f]) for of in (summary.voc[iou] for iou in VOC_IOUS)),
            number(float(summary.coco[:, f].mean())),
            *map(number, summary.curves[f].best_f1()),
            *(f"{of[f]:,}" for of in (summary.true, summary.true_images, summary.predicted)),
            _note(int(summary.true_images[f])),
        ]
        for f, finding in enumerate(summary.findings)
    ]
    means = [interval(of.mean, of.mean_low, of.mean_high) for of in (summary.voc[iou] for iou in VOC_IOUS)]
    counts = [f"{of.sum():,}" for of in (summary.true, summary.true_images, summary.predicted)]
    measured = f"{len(summary.findings) - len(summary.without_truth)} of {len(summary.findings)} findings"
    return Table(head, [*rows, ["mean", *means, number(summary.map_50_95), "", "", *counts, measured]])


def _note(images: int) -> str:
    if not images:
        return "no ground-truth box"
    return "" if images >= FEW else f"{counted(images, 'image')}: too few to trust the interval"


def precision_legend(summary: DetectionSummary, resamples: int) -> str:
    """Explains the columns."""
    left = ", ".join(summary.without_truth)
    return (
        "AP is the area under the precision-recall curve (all points, PASCAL VOC 2010): in descending order of "
        "score, each predicted box is matched to the ground-truth box with which it has the highest IoU, and is a "
        "true positive if the IoU exceeds the threshold and that box is not matched yet. AP of COCO is the mean over "
        f"IoU .5 to .95 of the precision at 101 recalls. The highest F1 is that of the best score threshold at IoU > "
        f"{VOC_IOUS[0]:g}; it is optimistic, since the threshold is chosen on the same images. "
        f"Intervals are percentile intervals of {resamples:,} bootstrap resamples of patients with all of their "
        f"images. Means are over the findings with ground-truth boxes{f' (none of {left})' if left else ''}."
    )


def write_findings(summary: DetectionSummary, out: str) -> str:
    """Write all metrics as OUT/boxes.csv, one row for each finding and the mean; returns its URI."""
    rows = [_csv_row(summary, f, finding) for f, finding in enumerate(summary.findings)]
    mean: dict[str, Any] = {"finding": "mean", "ground_truth_boxes": int(summary.true.sum())}
    mean |= {"ground_truth_images": int(summary.true_images.sum()), "predicted_boxes": int(summary.predicted.sum())}
    for iou in VOC_IOUS:
        of, name = summary.voc[iou], f"ap_{100 * iou:.0f}"
        mean |= {name: of.mean, f"{name}_low": of.mean_low, f"{name}_high": of.mean_high}
    measured = summary.coco[:, summary.true > 0]
    mean |= _coco(measured.mean(1) if measured.size else np.full(len(COCO_IOUS), np.nan))
    uri = storage.join(out, "boxes.csv")
    storage.write_text(uri, csv_text([*rows, mean]))
    return uri


def _csv_row(summary: DetectionSummary, f: int, finding: str) -> dict[str, Any]:
    row: dict[str, Any] = {"finding": finding, "ground_truth_boxes": int(summary.true[f])}
    row |= {"ground_truth_images": int(summary.true_images[f]), "predicted_boxes": int(summary.predicted[f])}
    for iou in VOC_IOUS:
        of, name = summary.voc[iou], f"ap_{100 * iou:.0f}"
        values = (of.value[f], of.low[f], of.high[f])
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))
    row |= dict(zip(("best_f1", "best_f1_score"), summary.curves[f].best_f1(), strict=True))
    return row | _coco(summary.coco[:, f])


def _coco(values_T: np.ndarray) -> dict[str, float]:
    named = {f"coco_ap_{100 * iou:.0f}": float(value) for iou, value in zip(COCO_IOUS, values_T, strict=True)}
    return {"coco_ap": float(values_T.mean()), **named}


def confusion_table(counts: np.ndarray, findings: Sequence[str]) -> Table:
    """Rows are predicted findings, columns are true findings."""
    names = [*findings, BACKGROUND]
    rows = [[name, *(f"{value:,}" for value in line)] for name, line in zip(names, counts.tolist(), strict=True)]
    return Table(["predicted \\ ground truth", *names], rows)


def confusion_figure(counts: np.ndarray, findings: Sequence[str]) -> Figure:
    """Each column as shares of the ground-truth boxes of a finding; findings without a ground-truth or predicted box
    are left out."""
    used = np.flatnonzero(counts.any(0) | counts.any(1) | (np.arange(len(counts)) == len(findings)))
    names, counts = np.array([*findings, BACKGROUND])[used].tolist(), counts[np.ix_(used, used)]
    side = 2.6 + 0.42 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(0))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0).tolist():
        shade = "white" if shares[row, column] > 0.5 else "0.2"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=6, color=shade)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("ground-truth finding", fontsize=8)
    axes.set_ylabel("predicted finding", fontsize=8)
    axes.set_title("Confusion matrix of boxes; shades are shares of a column", fontsize=9)
    return figure


def curves_figure(summary: DetectionSummary) -> Figure:
    """Precision against recall of the boxes, one line for each finding with ground-truth boxes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    aps = summary.voc[VOC_IOUS[0]].value
    for f in np.argsort(-np.nan_to_num(aps, nan=-1.0), kind="stable").tolist():
        curve = summary.curves[f]
        if curve.true and len(curve.scores):
            recall, precision = np.append(0, curve.recall), np.append(curve.precision[0], curve.precision)
            label, line = f"{summary.findings[f]} {aps[f]:.2f}", "-" if f < 10 else "--"
            axes.step(recall, precision, where="pre", lw=1.4, label=label, color=palette.series(f), linestyle=line)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"Precision and recall of boxes at IoU > {VOC_IOUS[0]:g}, with AP", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def froc_table(summary: DetectionSummary) -> Table:
    """Sensitivity of each finding at FROC_RATES false positives per image, and the means over findings."""
    head = ["finding", *(f"{rate:g} per image" for rate in FROC_RATES), "mean", "ground-truth boxes"]
    rates_FR = summary.froc
    rows = [
        [finding, *map(number, rates_FR[f].tolist()), number(float(rates_FR[f].mean())), f"{summary.true[f]:,}"]
        for f, finding in enumerate(summary.findings)
    ]
    measured = rates_FR[summary.true > 0]
    means = measured.mean(0).tolist() if len(measured) else [float("nan")] * len(FROC_RATES)
    return Table(head, [*rows, ["mean", *map(number, means), number(summary.mean_froc), f"{summary.true.sum():,}"]])


def froc_legend() -> str:
    """Explains `froc_table`."""
    return (
        "FROC: sensitivity, i.e. the share of the ground-truth boxes of a finding that are detected, at the score "
        "threshold with the given number of false positives of that finding per image. Only images in which the "
        "finding is known to be present or absent count. A box is detected if a predicted box overlaps it at IoU > "
        f"{VOC_IOUS[0]:g}."
    )


def froc_figure(summary: DetectionSummary) -> Figure:
    """Sensitivity against false positives per image, one line for each finding with ground-truth boxes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rates_FR, lowest, highest = summary.froc, FROC_RATES[0] / 4, FROC_RATES[-1]
    for f in np.argsort(-np.nan_to_num(rates_FR.mean(1), nan=-1.0), kind="stable").tolist():
        curve = summary.curves[f]
        if curve.true and len(curve.scores):
            per_image = curve.false_positive / max(1, summary.known_images[f])
            before = curve.recall[per_image <= lowest].max(initial=0)
            shown = per_image > lowest
            x = np.concatenate([[lowest], per_image[shown], [highest]])
            y = np.maximum.accumulate(np.concatenate([[before], curve.recall[shown], [curve.recall[-1]]]))
            label, line = f"{summary.findings[f]} {rates_FR[f].mean():.2f}", "-" if f < 10 else "--"
            axes.step(x, y, where="post", lw=1.4, label=label, color=palette.series(f), linestyle=line)
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [lowest, *FROC_RATES], [f"1/{1 / rate:g}" if rate < 1 else f"{rate:g}" for rate in (lowest, *FROC_RATES)]
    )
    axes.set(xlim=(lowest, highest), ylim=(0, 1.02), xlabel="false positives of the finding per image, log scale")
    axes.set_ylabel("sensitivity (share of the ground-truth boxes)")
    axes.grid(color=palette.GRID)
    axes.set_title(f"FROC at IoU > {VOC_IOUS[0]:g}, with the mean sensitivity", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def distribution_figure(counts: Mapping[str, np.ndarray], names: Sequence[str], title: str, unit: str) -> Figure:
    """Bars side by side: how many of each name each of the two counts has; names without any are left out."""
    used = np.flatnonzero(np.any([*counts.values()], axis=0))
    names, counts = [names[f] for f in used.tolist()], {name: of[used] for name, of in counts.items()}
    figure = Figure(figsize=(7, 0.36 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(counts)
    for number_, (name, of) in enumerate(counts.items()):
        places = np.arange(len(names)) + (number_ - (len(counts) - 1) / 2) * height
        bars = axes.barh(places, of, height, label=name, color=_COLORS[name])
        axes.bar_label(bars, [f"{value:,.0f}" for value in of], padding=2, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.tick_params("x", labelsize=8)
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(counts) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def area_figure(shares: Mapping[str, Sequence[np.ndarray]], findings: Sequence[str]) -> Figure:
    """Box plots of the boxes' areas as shares of the image, on a log axis; findings without boxes are left out."""
    used = [f for f in range(len(findings)) if any(len(of[f]) for of in shares.values())]
    findings, shares = [findings[f] for f in used], {name: [of[f] for f in used] for name, of in shares.items()}
    figure = Figure(figsize=(7, 0.42 * len(findings) + 1.3), layout="constrained")
    axes = figure.subplots()
    for (name, of), shift in zip(shares.items(), (-0.19, 0.19) if len(shares) == 2 else (0,), strict=True):
        filled = [f for f, values in enumerate(of) if len(values)]
        if filled:
            line = {"color": _COLORS[name]}
            plot = axes.boxplot(
                [of[f] for f in filled],
                positions=[f + shift for f in filled],
                widths=0.3,
                orientation="horizontal",
                manage_ticks=False,
                boxprops=line,
                whiskerprops=line,
                capprops=line,
                medianprops=line | {"linewidth": 2.5},
                flierprops={"marker": ".", "markersize": 2, "markeredgecolor": _COLORS[name]},
            )
            plot["boxes"][0].set_label(name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params("x", labelsize=8)
    axes.set_yticks(range(len(findings)), findings, fontsize=8)
    axes.set_ylim(len(findings) - 0.5, -0.5)
    axes.set_xlabel("area, share of the image, log scale", fontsize=8)
    axes.set_title("Area of boxes by finding", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
