"""The results of a search: a ranked table (CSV and Markdown), parallel coordinates, importances."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from matplotlib import colormaps
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution

from cxr import storage
from cxr.reporting import palette
from cxr.reporting.figures import save_figure
from cxr.reporting.tables import csv_lines, markdown

FEWEST_FOR_IMPORTANCES = 20  # trials; estimates from fewer are noise


@dataclass(frozen=True)
class Trial:
    """One row of the results: the sampled settings and what they led to."""

    trial: str
    status: str  # "done", "stopped early" or "failed: …"
    epochs: int
    value: float  # best of the recipe's monitor; NaN for a failed trial
    sampled: dict[str, Any]
    metrics: dict[str, float]
    checkpoint: str  # "" for a failed trial
    on_front: bool | None = None  # the Pareto front of several objectives; None where only the monitor counts

    def row(self, monitor: str) -> dict[str, Any]:
        """The trial as one flat table row; the checkpoint's URI last."""
        return {
            "trial": self.trial,
            monitor: self.value,
            **self.front(),
            "status": self.status,
            "epochs": self.epochs,
            **self.sampled,
            **{name: value for name, value in self.metrics.items() if name != monitor},
            "checkpoint": self.checkpoint,
        }

    def front(self) -> dict[str, str]:
        """The column that says whether the trial is on the Pareto front, where there is one."""
        return {} if self.on_front is None else {"on_front": "yes" if self.on_front else "no"}


def write_trials(trials: Sequence[Trial], monitor: str, out: str, objectives: Collection[str] = ()) -> str:
    """Write OUT/trials.csv with every column and OUT/trials.md to read; returns the latter's URI.

    `trials` are ranked already, by the monitor.
    """
    rows = [trial.row(monitor) for trial in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    storage.write_text(storage.join(out, "trials.csv"), "".join(csv_lines(rows, names)))
    uri = storage.join(out, "trials.md")
    storage.write_text(uri, trials_table(trials, monitor, objectives))
    return uri


def trials_table(trials: Sequence[Trial], monitor: str, objectives: Collection[str] = ()) -> str:
    """Markdown table of rank, trial, monitor, other objectives, Pareto front, epochs, status and sampled settings."""
    secondary = [name for name in objectives if name != monitor]
    settings = list(dict.fromkeys(name for trial in trials for name in trial.sampled))
    front = list(dict.fromkeys(name for trial in trials for name in trial.front()))
    head = ["rank", "trial", monitor, *secondary, *front, "epochs", "status", *settings]
    rows = [
        [
            str(rank),
            t.trial,
            _number(t.value),
            *(_number(t.metrics.get(n, math.nan)) for n in secondary),
            *t.front().values(),
            str(t.epochs),
            t.status,
            *(_number(t.sampled.get(n)) for n in settings),
        ]
        for rank, t in enumerate(trials, 1)
    ]
    return markdown(head, rows)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def study_of(trials: Sequence[Trial], space: Mapping[str, BaseDistribution], maximize: bool) -> optuna.Study:
    """The trials that gave a value, as an Optuna study: for its importance estimate and its own plots."""
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    for trial in trials:
        if math.isfinite(trial.value):
            params = {name: trial.sampled[name] for name in space}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(space), value=trial.value))
    optuna.logging.set_verbosity(quiet)
    return study


def evaluator() -> optuna.importance.BaseImportanceEvaluator:
    """A setting's importance is its share in the variance of the value: PED-ANOVA (Watanabe et al. 2023)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.importance.PedAnovaImportanceEvaluator()


def write_search_pictures(
    trials: Sequence[Trial],
    space: Mapping[str, BaseDistribution],
    monitor: str,
    maximize: bool,
    out: str,
    objectives: Mapping[str, str] | None = None,
) -> list[str]:
    """Parallel coordinates by the monitor, importances for it and for each other objective ("min" or "max"), as PNG.

    Returns their URIs; none if no trial has a value.
    """
    good = [trial for trial in trials if math.isfinite(trial.value)]
    if not good:
        return []
    names = [name for name, d in space.items() if not d.single()]
    pictures = [save_figure(_parallel(good, {n: space[n] for n in names}, monitor), out, "parallel_coordinates.png")]
    pictures += _write_importances(good, space, monitor, maximize, out, "importances.png")
    for name, mode in (objectives or {}).items():
        if name != monitor:
            valued = [replace(trial, value=trial.metrics.get(name, math.nan)) for trial in good]
            pictures += _write_importances(valued, space, name, mode == "max", out, f"importances_{name}.png")
    return pictures


def _write_importances(
    trials: Sequence[Trial], space: Mapping[str, BaseDistribution], metric: str, maximize: bool, out: str, name: str
) -> list[str]:
    study = study_of(trials, space, maximize)
    if len(study.trials) < FEWEST_FOR_IMPORTANCES:
        return []
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator())
    return [save_figure(_importances(importances, metric, len(study.trials)), out, name)]


def _importances(importances: Mapping[str, float], metric: str, trials: int) -> Figure:
    """A bar for each setting, the most important on top.

    Optuna's own plot sets pyplot's style for the whole process, and adds a gray background and a title.
    """
    figure = Figure(figsize=(7.5, 0.4 * len(importances) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([*importances], [*importances.values()], 0.7, color=palette.MODEL)
    axes.bar_label(bars, [f"{value:.2f}" for value in importances.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("share of the variance", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Importance of the settings for {metric} (PED-ANOVA, {trials} trials)", fontsize=10)
    return figure


def _parallel(trials: Sequence[Trial], space: Mapping[str, BaseDistribution], monitor: str) -> Figure:
    """One line for each trial over one axis for each setting, colored by rank; the best is drawn last and thick.

    Optuna's own plot cuts long names, shows whole numbers with fractions and does not mark the best trial.
    """
    figure = Figure(figsize=(1.5 * len(space) + 2.5, 4.8), layout="constrained")
    axes = figure.subplots()
    colors = _colors(trials)
    for trial, color in reversed(list(zip(trials, colors, strict=True))):
        heights = [_height(trial.sampled[name], d) for name, d in space.items()] + [_share(trial, trials)]
        axes.plot(heights, color=color, lw=2.8 if trial is trials[0] else 1.2, alpha=0.9, marker="o", ms=3)
    for at, distribution in enumerate(space.values()):
        axes.axvline(at, color=palette.FRAME, lw=0.8, zorder=0)
        for height, text in _ticks(distribution):
            axes.text(at + 0.04, height, text, **_TICK)
    values = [trial.value for trial in trials]
    for height, value in ((0, min(values)), (1, max(values))):
        axes.text(len(space) + 0.04, height, f"{value:.4g}", **_TICK)
    axes.set_xlim(-0.1, len(space) + 0.4)
    axes.set_xticks(range(len(space) + 1), [*space, monitor], rotation=30, ha="right", fontsize=8)
    axes.set_yticks([])
    axes.set_title(f"{len(trials)} trials, colored by {monitor}; the thick line is the best one", fontsize=10)
    axes.spines[:].set_visible(False)
    return figure


_TICK: dict[str, Any] = {
    "fontsize": 7,
    "va": "center",
    "zorder": 5,
    "bbox": {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8},
}


def _colors(trials: Sequence[Trial]) -> list[Any]:
    return [colormaps["viridis"](0.95 - 0.85 * rank / max(1, len(trials) - 1)) for rank in range(len(trials))]


def _share(trial: Trial, trials: Sequence[Trial]) -> float:
    values = [t.value for t in trials]
    return (trial.value - min(values)) / ((max(values) - min(values)) or 1)


def _height(value: Any, distribution: BaseDistribution) -> float:
    """Position of a sampled value on its axis, 0–1, on a log scale if it was sampled on one."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices.index(value) / max(1, len(distribution.choices) - 1)
    low, high = distribution.low, distribution.high  # pyright: ignore[reportAttributeAccessIssue]
    if distribution.log:  # pyright: ignore[reportAttributeAccessIssue]
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / ((high - low) or 1)


def _ticks(distribution: BaseDistribution) -> list[tuple[float, str]]:
    if isinstance(distribution, CategoricalDistribution):
        return [(_height(choice, distribution), str(choice)) for choice in distribution.choices]
    ends = (distribution.low, distribution.high)  # pyright: ignore[reportAttributeAccessIssue]
    return [(_height(end, distribution), f"{end:g}") for end in ends]
