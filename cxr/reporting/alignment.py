"""Tables and figures of an aligner's run: transforms, pose errors, overlap of lungs, images before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr import storage
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import figures, palette
from cxr.reporting.tables import Table, csv_text, interval, number

PARAMETERS = {
    "rotation_deg": ("rotation", "degrees, clockwise", 1),
    "scale": ("scale", "share of the width", 3),
    "stretch": ("stretch", "width over height", 3),
    "shift_x_pct": ("shift to the right", "% of the width", 1),
    "shift_y_pct": ("shift down", "% of the width", 1),
}
"""Name, unit and digits of what `metrics.alignment.parameters` returns."""
HEADLINES = {
    "corner_error_pct": ("distance of the corners from the ground-truth pose, % of the width", 2),
    "mask_iou": ("IoU of the ground-truth lung masks of two images, mean over pairs", 3),
    "group_correlation": ("correlation of an image with the mean image", 3),
}
"""Name and digits of each metric that is measured before and after alignment."""
SHORT_TITLES = {
    "corner_error_pct": "pose error, % of the width",
    "mask_iou": "IoU of lungs",
    "group_correlation": "correlation with the mean image",
}
_QUANTILES = {"minimum": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "maximum": 1}
_BINS = 30


def headline_table(
    measured: Mapping[str, tuple[MeanInterval, MeanInterval, MeanInterval]], counts: Mapping[str, int]
) -> Table:
    """A row for each of HEADLINES that was measured: before, after, and the difference, with intervals."""
    head = ["metric", "images", "before alignment", "after (95 %)", "after minus before (95 %)"]
    rows = []
    for name, of in measured.items():
        title, digits = HEADLINES[name]
        cells = [interval(part.value, part.low, part.high, digits) for part in of]
        rows.append([title, f"{counts[name]:,}", *cells])
    return Table(head, rows)


def legend(resamples: int, size: int) -> str:
    """Explains `headline_table`."""
    return (
        f"Intervals are percentile intervals of {resamples:,} bootstrap resamples of patients with all of their "
        "images. An aligner's choice of the common frame is arbitrary. The distance from the ground-truth pose is "
        "therefore measured after the constant transform that fits best was applied; the other metrics are measured "
        "after the mean transform was removed, so that zooming in does not improve them. Masks are compared at "
        f"{size} x {size} px. The correlation is that of contrast-normalized images."
    )


def parameter_table(predicted: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> Table:
    """The distribution of each part of the transforms, and of the known poses if there are any."""
    rows = []
    for name, (title, unit, digits) in PARAMETERS.items():
        for kind, of in (("predicted", predicted), ("ground truth", true)):
            if name in of and len(of[name]):
                values = np.quantile(of[name], list(_QUANTILES.values())).tolist()
                label = f"{title}, {kind}" if true else title
                rows.append([label, unit, *(number(value, digits) for value in values)])
    return Table(["part of the transform", "unit", *_QUANTILES], rows)


def parameter_legend() -> str:
    """Explains the parts of a transform."""
    return (
        "A transform maps the common frame to the image: it describes the pose of the chest in the image, with "
        "rotations clockwise and shifts to the right and down. Scale is the fraction of the image's width that the "
        "common frame covers (geometric mean of both axes), and stretch is the ratio of its width to its height."
    )


def distributions_figure(predicted: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> Figure:
    """A histogram for each part of the transforms; the known poses as a line."""
    figure = figures.new_figure(11, 2.7)
    axes = figure.subplots(1, len(PARAMETERS))
    for ax, (name, (title, unit, _)) in zip(axes, PARAMETERS.items(), strict=True):
        both = [of[name] for of in (predicted, true) if name in of and len(of[name])]
        low, high = _limits(np.concatenate(both))
        bins = np.linspace(low, high, _BINS + 1)
        ax.hist(predicted[name], bins, color=palette.PREDICTION, alpha=0.6, label="predicted")
        if len(both) == 2:
            ax.hist(true[name], bins, histtype="step", color=palette.TRUTH, linewidth=1.6, label="ground truth")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(unit, fontsize=7.5)
        _tidy(ax)
    axes[0].set_ylabel("images", fontsize=8)
    if true:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
        )
    return figure


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of an axis that shows all values."""
    low, high = float(values.min()), float(values.max())
    margin = max(1e-3, 0.03 * (high - low))
    return low - margin, high + margin


def pose_figure(predicted: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> Figure:
    """Each part of the transforms against the known poses; a perfect aligner lies on the dashed line."""
    figure = figures.new_figure(11, 2.7)
    axes = figure.subplots(1, len(PARAMETERS))
    for ax, (name, (title, unit, _)) in zip(axes, PARAMETERS.items(), strict=True):
        ends = _limits(np.concatenate([predicted[name], true[name]]))
        ax.plot(ends, ends, color=palette.NEUTRAL, linewidth=0.8, linestyle="--")
        ax.plot(true[name], predicted[name], ".", color=palette.MODEL, markersize=3.5, alpha=0.6)
        ax.set(xlim=ends, ylim=ends, aspect="equal")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(f"ground truth, {unit}", fontsize=7.5)
        _tidy(ax)
    axes[0].set_ylabel("predicted", fontsize=8)
    return figure


def improvement_figure(measured: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Histograms of each image's value before and after alignment, one panel for each metric."""
    figure = figures.new_figure(3.6 * len(measured) + 0.4, 2.8)
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for ax, (title, (before, after)) in zip(axes, measured.items(), strict=True):
        bins = np.linspace(*_limits(np.concatenate([before, after])), _BINS + 1)
        ax.hist(before, bins, color=palette.NEUTRAL, alpha=0.45, label="before")
        ax.hist(after, bins, color=palette.MODEL, alpha=0.7, label="after")
        ax.set_xlabel(title, fontsize=8)
        ax.set_ylabel("images", fontsize=8)
        _tidy(ax)
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, ax: Axes) -> None:
    """A legend above all axes, of what one of them shows."""
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, fontsize=8, frameon=False)


def _tidy(ax: Axes) -> None:
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=palette.GRID)
    ax.set_axisbelow(True)


def gain_table(gains: Mapping[str, MeanInterval]) -> Table:
    """Differences between two runs on the same images."""
    rows = [
        [HEADLINES[name][0], interval(gain.value, gain.low, gain.high, HEADLINES[name][1])]
        for name, gain in gains.items()
    ]
    return Table(["metric after alignment", "this run minus the other (95 %)"], rows)


def write_transforms(rows: Sequence[Mapping[str, Any]], out: str) -> str:
    """Write the transform of each image, and what is known of it, as OUT/transforms.csv; returns its URI."""
    uri = storage.join(out, "transforms.csv")
    storage.write_text(uri, csv_text(rows))
    return uri
