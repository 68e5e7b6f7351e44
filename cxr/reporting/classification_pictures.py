"""Figures of a classifier: ROC and precision-recall curves, reliability diagrams, and AUROCs with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr.metrics.bootstrap import Intervals
from cxr.metrics.classification import ClassificationSummary, FindingRow, reliability
from cxr.metrics.classification.ranking import precision_recall_curve, roc_curve
from cxr.reporting import palette
from cxr.reporting.figures import panels
from cxr.reporting.page import Picture, save_picture
from cxr.reporting.tables import interval
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN

_NOTE_AT = 0.66  # of the width of the numbers beside a forest plot
_LINE = {"color": palette.NEUTRAL, "linewidth": 0.8, "linestyle": "--"}


def write_pictures(
    summary: ClassificationSummary,
    scores_NF: np.ndarray,
    labels_NF: np.ndarray,
    predicted_positive_NF: np.ndarray,
    out: str,
) -> list[Picture]:
    """Write all pictures into the URI `out`; none where no finding has both classes.

    Columns go as the summary's rows. Findings without both classes are left out of the pictures.
    """
    if not summary.measured:
        return []
    figures = {
        "auroc.png": (auroc_figure(summary), "AUROC of each finding with its 95 % interval."),
        "roc.png": (
            roc_figure(summary.rows, scores_NF, labels_NF, predicted_positive_NF),
            "ROC curves; the dot marks the checkpoint's decision threshold.",
        ),
        "precision_recall.png": (
            precision_recall_figure(summary.rows, scores_NF, labels_NF, predicted_positive_NF),
            "Precision and recall; the dot marks the decision threshold, the dashed line the prevalence.",
        ),
        "reliability.png": (
            reliability_figure(summary.rows, scores_NF, labels_NF),
            "Reliability: a calibrated model lies on the dashed line; the area of a dot is its share of the images.",
        ),
    }
    return [save_picture(figure, out, name, caption) for name, (figure, caption) in figures.items()]


def roc_figure(
    rows: Sequence[FindingRow], scores_NF: np.ndarray, labels_NF: np.ndarray, predicted_positive_NF: np.ndarray
) -> Figure:
    """A panel for each finding: its ROC curve, chance level, and the decision threshold."""

    def draw(ax: Axes, f: int) -> str:
        known, positive = labels_NF[:, f] != UNKNOWN, labels_NF[:, f] == POSITIVE
        ax.plot([0, 1], [0, 1], **_LINE)
        false, true = roc_curve(scores_NF[:, f], labels_NF[:, f])
        ax.fill_between(false, true, color=palette.MODEL_PALE)
        ax.plot(false, true, color=palette.MODEL, linewidth=1.6)
        predicted_positive = predicted_positive_NF[:, f].astype(bool)
        ax.plot(
            predicted_positive[known & ~positive].mean(),
            predicted_positive[positive].mean(),
            "o",
            color=palette.MARK,
            markersize=4,
        )
        return f"AUROC {rows[f].auroc:.3f}"

    title = "ROC curves; the red dot marks the decision threshold"
    return _panels(rows, draw, title, "1 − specificity", "sensitivity")


def precision_recall_figure(
    rows: Sequence[FindingRow], scores_NF: np.ndarray, labels_NF: np.ndarray, predicted_positive_NF: np.ndarray
) -> Figure:
    """A panel for each finding: precision against recall, prevalence, and the decision threshold."""

    def draw(ax: Axes, f: int) -> str:
        row = rows[f]
        prevalence = row.positives / (row.positives + row.negatives)
        ax.axhline(prevalence, **_LINE)
        precision, recall = precision_recall_curve(scores_NF[:, f], labels_NF[:, f])
        precision, recall = np.append(precision[0], precision), np.append(0, recall)
        ax.fill_between(recall, precision, step="pre", color=palette.MODEL_PALE)
        ax.step(recall, precision, where="pre", color=palette.MODEL, linewidth=1.6)
        if not math.isnan(row.precision):
            ax.plot(row.recall, row.precision, "o", color=palette.MARK, markersize=4)
        return f"AP {row.average_precision:.3f}"

    title = "Precision and recall; red dot: decision threshold; dashed line: prevalence"
    return _panels(rows, draw, title, "recall", "precision")


def reliability_figure(rows: Sequence[FindingRow], scores_NF: np.ndarray, labels_NF: np.ndarray) -> Figure:
    """A panel for each finding: observed share of positives against mean probability, with 95 % intervals."""
    bins = reliability(scores_NF, labels_NF)

    def draw(ax: Axes, f: int) -> str:
        used = bins.counts[f] > 0
        probability, observed, counts = (x[f][used] for x in (bins.probability, bins.observed, bins.counts))
        low, high = _wilson(observed, counts)
        ends = np.clip([observed - low, high - observed], 0, None)
        ax.plot([0, 1], [0, 1], **_LINE)
        ax.errorbar(probability, observed, ends, fmt="none", ecolor=palette.MODEL, elinewidth=0.8, alpha=0.6)
        ax.scatter(
            probability, observed, 8 + 90 * counts / counts.sum(), color=palette.MODEL, zorder=3, clip_on=False
        )
        return f"ECE {rows[f].calibration_error:.3f}"

    title = "Reliability; a calibrated model lies on the dashed line; dot areas are shares of the images"
    return _panels(rows, draw, title, "mean probability", "observed share of positives")


def separation_figure(
    findings: Sequence[str], scores_NF: np.ndarray, labels_NF: np.ndarray, value: str = "probability"
) -> Figure | None:
    """A panel for each finding with both classes: shares of the images with and without it, by their value."""
    both = [f for f in range(len(findings)) if {POSITIVE, NEGATIVE} <= {*np.unique(labels_NF[:, f]).tolist()}]
    if not both:
        return None
    title = f"Images with each finding (blue) and without it (gray), by {value}"
    figure, axes = panels(len(both), 2.15, 1.9, (title, value, "share of the images"))
    for ax, f in zip(axes, both, strict=True):
        for kind, color, alpha in ((NEGATIVE, palette.NEUTRAL, 0.5), (POSITIVE, palette.MODEL, 0.7)):
            values = scores_NF[labels_NF[:, f] == kind, f]
            ax.hist(
                values, bins=25, range=(0, 1), weights=np.full(len(values), 1 / len(values)), color=color, alpha=alpha
            )
        ax.set_title(_spoken(findings[f]), fontsize=8.5)
    return figure


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share of `count` (Wilson 1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return middle - half, middle + half


def _panels(
    rows: Sequence[FindingRow], draw: Callable[[Axes, int], str], title: str, x_label: str, y_label: str
) -> Figure:
    """Square panels of axes from 0 to 1, one for each finding with both classes, titled by what `draw` returns."""
    measured = [f for f, row in enumerate(rows) if not math.isnan(row.auroc)]
    figure, axes = panels(len(measured), 2.15, 2.55, (title, x_label, y_label))
    for ax, f in zip(axes, measured, strict=True):
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_title(f"{_spoken(rows[f].finding)}\n{draw(ax, f)}", fontsize=8.5)
    return figure


def auroc_figure(summary: ClassificationSummary) -> Figure:
    """Forest plot of AUROC with its intervals: findings with both classes, the best first, and their mean."""
    rows = sorted(summary.measured, key=lambda row: -row.auroc)
    lines = [_line(row, f"{row.positives:,} of {row.positives + row.negatives:,}") for row in rows]
    lines.append(_line(summary.mean, f"of {len(rows)} findings", bold=True))
    title = f"AUROC and 95 % interval, {summary.images:,} images of {summary.patients:,} patients"
    return _forest(lines, title, 0.5, "positive images")


def gain_figure(findings: Sequence[str], gain: Intervals) -> Figure:
    """Forest plot of the differences of two models' AUROCs, with intervals by patient."""
    measured = [f for f in range(len(findings)) if math.isfinite(gain.value[f])]
    measured.sort(key=lambda f: -gain.value[f])
    lines = [_Line(_spoken(findings[f]), gain.value[f], gain.low[f], gain.high[f]) for f in measured]
    lines.append(_Line("mean", gain.mean, gain.mean_low, gain.mean_high, bold=True))
    return _forest(lines, "AUROC minus that of the other run, and 95 % interval by patient", 0.0, "")


@dataclass(frozen=True)
class _Line:
    """A line of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""
    bold: bool = False


def _line(row: FindingRow, note: str, bold: bool = False) -> _Line:
    return _Line(_spoken(row.finding), row.auroc, row.auroc_low, row.auroc_high, note, bold)


def _forest(lines: Sequence[_Line], title: str, at: float, noted: str) -> Figure:
    """Forest plot: values with their intervals and a line at `at`, and next to it the same as numbers, with notes."""
    figure = Figure(figsize=(8.6, 0.3 * len(lines) + 1.3), layout="constrained")
    ax, beside = figure.subplots(1, 2, sharey=True, width_ratios=[5, 3 if noted else 2])
    ax.axvline(at, **_LINE)
    for row, line in enumerate(lines):
        _draw_line(ax, beside, row, line)
    ax.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=9)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.tick_params("x", labelsize=8)
    ax.tick_params("y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color=palette.GRID)
    ax.set_axisbelow(True)
    beside.set_axis_off()
    beside.set_title(noted, x=_NOTE_AT, loc="left", fontsize=8, color=palette.NEUTRAL)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_line(ax: Axes, beside: Axes, row: int, line: _Line) -> None:
    weight, marker, color, width = (
        ("bold", "D", palette.MARK, 1.8) if line.bold else ("normal", "o", palette.MODEL, 1.2)
    )
    ax.plot([line.low, line.high], [row, row], color=color, linewidth=width, solid_capstyle="butt")
    ax.plot(line.value, row, marker, color=color, markersize=5)
    said = interval(line.value, line.low, line.high)
    beside.text(0, row, said, va="center", fontsize=8, weight=weight)
    beside.text(_NOTE_AT, row, line.note, va="center", fontsize=8, color=palette.NEUTRAL)


def _spoken(finding: str) -> str:
    return finding.replace("_", " ")
