"""Metrics of a k-fold run: those of each fold, their mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cxr.reporting import tables

SD = "_sd"


def together(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the folds, and as NAME_sd its standard deviation (n − 1).

    NaN where a fold could not measure it: a mean over other folds would be one over other patients.
    """
    figures: dict[str, float] = {}
    for name in folds[0]:
        values = np.array([metrics.get(name, math.nan) for metrics in folds])
        figures |= {name: float(values.mean()), name + SD: float(values.std(ddof=1))}
    return figures


def table(folds: Sequence[Mapping[str, float]]) -> str:
    """A line a metric: mean ± SD, then each fold's value."""
    figures = together(folds)
    rows = [
        [
            name,
            f"{_number(figures[name])} ± {_number(figures[name + SD])}",
            *(_number(metrics.get(name, math.nan)) for metrics in folds),
        ]
        for name in sorted(folds[0])
    ]
    return tables.markdown(["metric", "mean ± SD", *(f"fold {number}" for number in range(len(folds)))], rows)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
