"""How the scores of a run are distributed: tables and histograms that need no ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from cxr.reporting import palette
from cxr.reporting.figures import panels
from cxr.reporting.tables import Table, number

QUANTILES = {"5th percentile": 0.05, "median": 0.5, "95th percentile": 0.95}
_BINS = 40


def share(count: int, of: int) -> str:
    """A percentage to read."""
    return f"{100 * count / of:.1f} %" if of else "–"


def quantiles(values: np.ndarray) -> dict[str, float]:
    """By the names of QUANTILES; NaN where there is no value."""
    if not len(values):
        return dict.fromkeys(QUANTILES, float("nan"))
    return dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))


def finding_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per finding with its positive images, its boxes if it has some, and QUANTILES of its scores."""
    boxes = ["boxes"] if rows and "boxes" in rows[0] else []
    lines = [
        [row["finding"], f"{row['positive']:,}", share(row["positive"], row["images"])]
        + [f"{row[name]:,}" for name in boxes]
        + [number(row[name]) for name in QUANTILES]
        for row in rows
    ]
    return Table(["finding", "positive images", "share", *boxes, *(f"score, {name}" for name in QUANTILES)], lines)


def quantile_table(values: Mapping[str, np.ndarray]) -> Table:
    """A row per name with the QUANTILES of its values."""
    return Table(["", *QUANTILES], [[name, *map(number, quantiles(of).values())] for name, of in values.items()])


def histograms_figure(values: Mapping[str, np.ndarray], title: str, x_label: str, y_label: str) -> Figure:
    """A panel for each name that has values, with their histogram; counts are on one logarithmic axis.

    Args:
        values: in [0, 1].

    Raises:
        ValueError: no name has values.
    """
    filled = {name: of for name, of in values.items() if len(of)}
    figure, axes = panels(len(filled), 2.3, 1.9, (title, x_label, y_label))
    highest = max((int(np.histogram(of, _BINS, (0, 1))[0].max()) for of in filled.values()), default=1)
    for ax, (name, of) in zip(axes, filled.items(), strict=True):
        ax.hist(of, bins=_BINS, range=(0, 1), color=palette.MODEL, log=True)
        ax.set_ylim(0.8, max(10, 1.5 * highest))  # a bar of one image shows
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(name.replace("_", " "), fontsize=8)
    return figure
