"""Metrics by subgroup: cells of tables, and a forest plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import palette
from cxr.reporting.figures import new_figure
from cxr.reporting.tables import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _PANEL = 0.27, 3.6  # inches: height of a group, width of a metric


@dataclass(frozen=True)
class Group:
    """A part of the images.

    Args:
        values: metrics by name; empty if there are too few patients.
    """

    name: str
    images: int
    patients: int
    values: Mapping[str, MeanInterval]


def cell(group: Group, metric: str) -> str:
    """The value of a metric with its interval; a dash if it cannot be measured."""
    if metric not in group.values:
        return "–"
    of = group.values[metric]
    return interval(of.value, of.low, of.high, 3 if abs(of.value) <= 1 else 1)


def forest_figure(whole: Group, groups: Mapping[str, Sequence[Group]], metrics: Sequence[str]) -> Figure:
    """A panel for each metric: its value in each group with its interval, and in all images as a dashed line.

    Args:
        groups: by what divides the images, such as "sex".
    """
    lines: list[tuple[str, Group | None]] = [("all images", whole)]
    for name, listed in groups.items():
        lines.append((f"by {name}", None))
        lines += [(f"{of.name} ({of.images:,})", of) for of in listed]
    figure = new_figure(2.2 + _PANEL * len(metrics), 0.9 + _ROW * len(lines))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = range(len(lines))
    for ax, metric in zip(axes, metrics, strict=True):
        overall = whole.values[metric].value
        if math.isfinite(overall):
            ax.axvline(overall, color=palette.NEUTRAL, lw=0.9, ls="--")
        for place, (_, of) in zip(places, lines, strict=True):
            value = of.values.get(metric) if of else None
            if value is None or not math.isfinite(value.value):
                continue
            color = palette.MARK if of is whole else palette.MODEL
            ax.plot([value.low, value.high], [place, place], color=color, lw=1.6)
            ax.plot(value.value, place, "D" if of is whole else "o", color=color, ms=5)
        ax.set_title(metric, fontsize=10)
        ax.grid(axis="x", color=palette.GRID)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_axisbelow(True)
    axes[0].set_yticks(places, [label for label, _ in lines], fontsize=9)
    for tick, (_, of) in zip(axes[0].get_yticklabels(), lines, strict=True):
        if of is None or of is whole:
            tick.set_fontweight("bold")
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    return figure
