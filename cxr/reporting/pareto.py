"""Trials of a search with several objectives: which are on the Pareto front, and a picture of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr.reporting import palette
from cxr.reporting.figures import save_figure
from cxr.reporting.trials import Trial

Place = tuple[float, float]


def on_front(values: np.ndarray) -> np.ndarray:
    """Which rows of (N, K), more being better, no other row dominates; boolean (N,).

    A row dominates another if it is better in a column and at least equal in all others, so equal rows stand or fall
    together. Rows with NaN or infinity are not on the front and dominate nothing.
    """
    finite = _finite(values)
    no_worse = np.all(values[:, None] >= values[None], axis=2)  # [i, j]: row i than row j
    better = np.any(values[:, None] > values[None], axis=2)
    return finite & ~np.any(no_worse & better & np.expand_dims(finite, 1), axis=0)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(values).all(axis=1))


def marked(trials: Sequence[Trial], objectives: Mapping[str, str]) -> list[Trial]:
    """The trials in their order, each marked if it is on the front of `objectives` ("min" or "max")."""
    if not (trials and objectives):
        return list(trials)
    signs = [1 if mode == "max" else -1 for mode in objectives.values()]
    front = on_front(_values(trials, objectives) * signs)
    return [replace(trial, on_front=bool(on)) for trial, on in zip(trials, front, strict=True)]


def _values(trials: Sequence[Trial], objectives: Mapping[str, str]) -> np.ndarray:
    return np.array([[trial.metrics.get(name, np.nan) for name in objectives] for trial in trials])


def entries(trials: Sequence[Trial], objectives: Mapping[str, str]) -> list[dict[str, Any]]:
    """The front's trials as plain data, in their order."""
    return [
        {
            "trial": trial.trial,
            "objectives": {name: trial.metrics[name] for name in objectives},
            "checkpoint": trial.checkpoint,
            "sampled": trial.sampled,
        }
        for trial in trials
        if trial.on_front
    ]


def write_picture(trials: Sequence[Trial], objectives: Mapping[str, str], out: str) -> list[str]:
    """OUT/pareto.png, one plot for each two objectives; its URI, none where no trial is on the front."""
    if not any(trial.on_front for trial in trials):
        return []
    finite = _finite(_values(trials, objectives))
    shown = [trial for trial, ok in zip(trials, finite, strict=True) if ok]
    return [save_figure(_figure(shown, objectives), out, "pareto.png")]


def _figure(trials: Sequence[Trial], objectives: Mapping[str, str]) -> Figure:
    """One plot for each two objectives; where there are just two, the front is joined."""
    pairs = list(combinations(objectives, 2))
    figure = Figure(figsize=(6.5 * len(pairs), 5.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _plot(axes, _places(trials, names), {name: objectives[name] for name in names}, joined=len(pairs) == 1)
    front = sum(bool(trial.on_front) for trial in trials)
    figure.suptitle(f"{front} of {len(trials)} trials on the Pareto front", fontsize=10)
    return figure


def _places(trials: Sequence[Trial], names: Sequence[str]) -> dict[Place, list[Trial]]:
    """The trials at each place of a plot; often one, but seeds and settings without effect make equals."""
    places: dict[Place, list[Trial]] = {}
    for trial in trials:
        places.setdefault((trial.metrics[names[0]], trial.metrics[names[1]]), []).append(trial)
    return places


def _plot(axes: Axes, places: Mapping[Place, list[Trial]], objectives: Mapping[str, str], joined: bool) -> None:
    """Every place on the front with its trials' ids; the values at the ends of a joined front stand above."""
    front = sorted(place for place, named in places.items() if any(trial.on_front for trial in named))
    if joined:
        axes.plot(*zip(*front, strict=True), color=palette.MODEL, lw=1.2, zorder=1)
        ends = dict.fromkeys((front[0], front[-1]))
        axes.set_title("\n".join(_label(end, places[end], objectives) for end in ends), loc="left", fontsize=8)
    for place, named in places.items():
        leads = place in front
        color = palette.MODEL if leads else palette.FRAME
        axes.scatter(*place, s=36 if leads else 14, color=color, zorder=2)
        if leads:
            _name(axes, place, named, objectives)
    axes.margins(0.2)
    x, y = (f"{name} ({'more' if mode == 'max' else 'less'} is better)" for name, mode in objectives.items())
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=palette.GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(axes: Axes, place: Place, named: Sequence[Trial], objectives: Mapping[str, str]) -> None:
    """Write the trials' names beyond the front and across it, so that neighbors do not collide."""
    right, up = (mode == "max" for mode in objectives.values())
    axes.annotate(
        _ids(named),
        place,
        (4 if right else -4, 4 if up else -4),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom" if up else "top",
        rotation=45 if right == up else -45,
        rotation_mode="anchor",
        fontsize=8,
        zorder=3,
    )


def _ids(named: Sequence[Trial]) -> str:
    return ", ".join(trial.trial for trial in named)


def _label(place: Place, named: Sequence[Trial], names: Iterable[str]) -> str:
    return f"{_ids(named)}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, place, strict=True))
