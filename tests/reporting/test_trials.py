"""The table of trials and what each setting matters, with one objective and with several."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution

from cxr.reporting.pareto import marked
from cxr.reporting.trials import Trial, evaluator, study_of, trials_table, write_search_pictures, write_trials

BOTH = {"auroc": "max", "error": "min"}
SPACE = {"lr": FloatDistribution(0, 1), "decay": FloatDistribution(0, 1)}
TRIALS = [
    Trial("t_0", "done", 3, 0.9, {"lr": 0.1}, {"auroc": 0.9, "error": 8.0}, "/a"),
    Trial("t_1", "done", 3, 0.8, {"lr": 0.2}, {"auroc": 0.8, "error": 9.0}, "/b"),
    Trial("t_2", "failed: lost", 0, math.nan, {"lr": 0.3}, {}, ""),
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]


def test_the_table_of_one_objective_has_no_front() -> None:
    head, _, first, *_ = cells(trials_table(TRIALS, "auroc"))
    assert head == ["rank", "trial", "auroc", "epochs", "status", "lr"]
    assert first == ["1", "t_0", "0.9", "3", "done", "0.1"]


def test_the_table_of_two_objectives_marks_the_front(tmp_path: Path) -> None:
    trials = marked(TRIALS, BOTH)
    uri = write_trials(trials, "auroc", str(tmp_path), BOTH)
    head, _, *rows = cells(Path(uri).read_text())
    assert head == ["rank", "trial", "auroc", "error", "on_front", "epochs", "status", "lr"]
    assert [row[3:5] for row in rows] == [["8", "yes"], ["9", "no"], ["nan", "no"]]
    with (tmp_path / "trials.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["on_front"] for row in written] == ["yes", "no", "no"]
    assert [row["error"] for row in written] == ["8.0", "9.0", ""]


def test_each_objective_has_its_own_importances(tmp_path: Path) -> None:
    """The monitor follows lr alone, the other objective decay alone."""
    drawn = [{"lr": i / 40, "decay": (i * 17 % 40) / 40} for i in range(40)]
    trials = [
        Trial(f"t_{i}", "done", 1, d["lr"], d, {"auroc": d["lr"], "error": d["decay"]}, "/")
        for i, d in enumerate(drawn)
    ]
    written = write_search_pictures(trials, SPACE, "auroc", True, str(tmp_path), BOTH)
    assert [Path(uri).name for uri in written] == [
        "parallel_coordinates.png",
        "importances.png",
        "importances_error.png",
    ]
    by_error = [replace(trial, value=trial.metrics["error"]) for trial in trials]
    for valued, maximize, name in ((trials, True, "lr"), (by_error, False, "decay")):
        shares = optuna.importance.get_param_importances(study_of(valued, SPACE, maximize), evaluator=evaluator())
        assert next(iter(shares)) == name
    assert len(write_search_pictures(trials, SPACE, "auroc", True, str(tmp_path))) == 2
    few = write_search_pictures(trials[:19], SPACE, "auroc", True, str(tmp_path))
    assert [Path(uri).name for uri in few] == ["parallel_coordinates.png"], "importances of few trials are noise"
