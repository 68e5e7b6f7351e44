"""The Pareto front: its members, their table and their picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cxr.reporting import pareto
from cxr.reporting.trials import Trial

BOTH = {"auroc": "max", "error": "min"}


def trial(name: str, auroc: float, error: float) -> Trial:
    return Trial(name, "done", 3, auroc, {"lr": 0.1}, {"auroc": auroc, "error": error}, f"/{name}")


FAILED = Trial("f", "failed: lost", 0, math.nan, {"lr": 0.1}, {}, "")
TRIALS = [trial("a", 0.9, 8.0), trial("b", 0.8, 5.0), trial("c", 0.8, 6.0), trial("d", 0.7, 2.0), FAILED]


def test_a_row_is_on_the_front_unless_another_dominates_it() -> None:
    values = np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
    assert pareto.on_front(values).tolist() == [True, True, False, True, False]
    assert pareto.on_front(values[:1]).tolist() == [True]


def test_equal_rows_are_all_on_the_front_or_none() -> None:
    assert pareto.on_front(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])).tolist() == [True, True, True]
    assert pareto.on_front(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])).tolist() == [False, False, True]


def test_rows_that_are_not_finite_are_ignored() -> None:
    values = np.array([[math.nan, 9.0], [math.inf, 9.0], [9.0, -math.inf], [1.0, 1.0]])
    assert pareto.on_front(values).tolist() == [False, False, False, True]


def test_three_objectives() -> None:
    values = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
    assert pareto.on_front(values).tolist() == [True, True, False]


def test_trials_are_marked_by_which_way_each_objective_is_better() -> None:
    marked = pareto.marked(TRIALS, BOTH)
    assert [t.trial for t in marked] == [t.trial for t in TRIALS]
    assert [t.on_front for t in marked] == [True, True, False, True, False]
    assert [t.on_front for t in pareto.marked(TRIALS, {"auroc": "max", "error": "max"})] == [True, *[False] * 4]
    assert [t.on_front for t in pareto.marked(TRIALS, {})] == [None] * 5


def test_the_front_as_plain_data() -> None:
    entries = pareto.entries(pareto.marked(TRIALS, BOTH), BOTH)
    assert [entry["trial"] for entry in entries] == ["a", "b", "d"]
    assert entries[1] == {
        "trial": "b",
        "objectives": {"auroc": 0.8, "error": 5.0},
        "checkpoint": "/b",
        "sampled": {"lr": 0.1},
    }


def test_the_picture_joins_the_front_and_names_its_trials(tmp_path: Path) -> None:
    marked = pareto.marked([*TRIALS[:-1], trial("e", 0.8, 5.0)], BOTH)
    (axes,) = pareto._figure(marked, BOTH).axes
    (line,) = axes.lines
    assert np.column_stack(line.get_data()).tolist() == [[0.7, 2.0], [0.8, 5.0], [0.9, 8.0]]
    assert sorted(text.get_text() for text in axes.texts) == ["a", "b, e", "d"]
    assert axes.get_title(loc="left") == "d: auroc 0.7, error 2\na: auroc 0.9, error 8"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("auroc (more is better)", "error (less is better)")
    (uri,) = pareto.write_picture([*marked, FAILED], BOTH, str(tmp_path))
    assert uri == str(tmp_path / "pareto.png")
    assert imread(uri)[..., :3].std() > 0.01, "a blank picture"


def test_each_two_of_three_objectives_are_drawn_without_a_line() -> None:
    three = BOTH | {"lr": "max"}
    marked = [Trial("a", "done", 1, 1.0, {}, dict.fromkeys(three, 1.0), "/a", on_front=True)]
    axes = pareto._figure(marked, three).axes
    assert [(a.get_xlabel().split()[0], a.get_ylabel().split()[0]) for a in axes] == [
        ("auroc", "error"),
        ("auroc", "lr"),
        ("error", "lr"),
    ]
    assert [len(a.lines) for a in axes] == [0, 0, 0]


@pytest.mark.parametrize("trials", [[], [FAILED]])
def test_without_trials_nothing_is_drawn(trials: list[Trial], tmp_path: Path) -> None:
    assert pareto.write_picture(pareto.marked(trials, BOTH), BOTH, str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
