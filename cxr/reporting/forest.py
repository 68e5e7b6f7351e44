"""Forest plots: metrics with intervals, a line for each group of images or each run, a panel for each metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import palette
from cxr.reporting.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _PANEL = 0.27, 3.6  # inches: height of a line, width of a metric
_COLUMNS = 3  # of panels


@dataclass(frozen=True)
class ForestLine:
    """A line of the plot.

    Args:
        values: metrics by name; without any, the line is a heading.
        reference: its values are drawn as dashed lines through the panels.
        points: more values of a metric to show as dots, such as those of each seed.
    """

    label: str
    values: Mapping[str, MeanInterval] = field(default_factory=dict)
    reference: bool = False
    points: Mapping[str, Sequence[float]] = field(default_factory=dict)


def forest_figure(
    lines: Sequence[ForestLine], metrics: Sequence[str], *, differences: Collection[str] = ()
) -> Figure:
    """A panel for each metric, in rows of at most three.

    Args:
        differences: metrics in whose panels 0 means no difference and is marked by a dashed line.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(_COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = new_figure(2.2 + _PANEL * columns, rows * (0.9 + _ROW * len(lines)))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    for ax, metric in zip(axes.flat, metrics, strict=False):
        if metric in differences:
            ax.axvline(0, color=palette.NEUTRAL, lw=0.9, ls="--")
        for place, line in enumerate(lines):
            value = line.values.get(metric)
            if value is None or not math.isfinite(value.value):
                continue
            color, marker = (palette.MARK, "D") if line.reference else (palette.MODEL, "o")
            if line.reference:
                ax.axvline(value.value, color=palette.NEUTRAL, lw=0.9, ls="--")
            ax.plot([value.low, value.high], [place, place], color=color, lw=1.6)
            ax.plot(value.value, place, marker, color=color, ms=5)
            if points := line.points.get(metric):
                ax.plot(points, [place] * len(points), "o", color=palette.NEUTRAL, ms=3, alpha=0.8)
        ax.set_title(metric, fontsize=10)
        ax.grid(axis="x", color=palette.GRID)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        ax.set_axisbelow(True)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=9)
        for tick, line in zip(ax.get_yticklabels(), lines, strict=True):
            if line.reference or not line.values:
                tick.set_fontweight("bold")
    axes[0, 0].set_ylim(len(lines) - 0.4, -0.6)
    return figure
