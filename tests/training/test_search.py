"""The parts of a search that need no cluster."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from cxr.cli.options import ArchiveOptions
from cxr.cli.search_jobs import tune_job
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.families.base import Stage
from cxr.training.options import RunOptions
from cxr.training.search import (
    BEST,
    STANDING,
    Sampler,
    SearchOptions,
    SettingsMismatchError,
    check_applied,
    early_stopping,
    objectives_of,
    standing,
)


class Weighed(AlignRecipe):
    """Has two objectives and trains in two stages."""

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        return {"pairwise_lung_iou": "max", "equivariance_error_pct": "min"}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("first", 6, 1e-3), Stage("last", self.epochs, 1e-3))


RECIPE = Weighed(epochs=4)
NAMES = ("pairwise_lung_iou", "equivariance_error_pct")


def test_applied_settings_must_equal_the_sampled_ones() -> None:
    check_applied({"lr": 0.1}, {"lr": 0.1, "epochs": 3})
    with pytest.raises(SettingsMismatchError, match=r"worker 1 .*lr: sampled 0.1, applied 0.2"):
        check_applied({"lr": 0.1, "backbone": "conv3"}, {"lr": 0.2, "backbone": "conv3"}, rank=1)
    with pytest.raises(SettingsMismatchError, match="applied None"):
        check_applied({"lr": 0.1}, {})


def test_objectives_include_their_direction() -> None:
    assert objectives_of(RECIPE, SearchOptions(objectives=NAMES[::-1])) == {
        "equivariance_error_pct": "min",
        "pairwise_lung_iou": "max",
    }
    assert objectives_of(RECIPE, SearchOptions()) == {}
    assert objectives_of(RECIPE, SearchOptions(objectives=("pairwise_lung_iou",))) == {}


@pytest.mark.parametrize(
    "names", [("pairwise_lung_iou", "psnr"), ("pairwise_lung_iou", "pairwise_lung_iou"), ("equivariance_error_pct",)]
)
def test_unsuitable_objectives_are_rejected_with_a_list(names: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match="expected two or more of pairwise_lung_iou, equivariance_error_pct, each once"
    ):
        objectives_of(RECIPE, SearchOptions(objectives=names))
    with pytest.raises(UserError, match="expected none for family align, got pairwise_lung_iou correlation"):
        objectives_of(AlignRecipe(), SearchOptions(objectives=("pairwise_lung_iou", "correlation")))


def test_invalid_objectives_end_a_job_before_anything_is_written(tmp_path: Path) -> None:
    options = SearchOptions(objectives=("pairwise_lung_iou", "psnr"))
    with pytest.raises(UserError, match="expected none for family align, got pairwise_lung_iou psnr"):
        tune_job(AlignRecipe(), ArchiveOptions(), options, RunOptions(), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_tune_gets_the_best_epoch_not_the_last() -> None:
    rows = [
        {"epoch": 1, "pairwise_lung_iou": 0.9, "equivariance_error_pct": 1.0, "rankable": False},
        {"epoch": 2, "pairwise_lung_iou": 0.8, "equivariance_error_pct": 7.0, "rankable": True},
        {"epoch": 3, "pairwise_lung_iou": 0.6, "equivariance_error_pct": 2.0, "rankable": True},
    ]
    assert standing(rows, RECIPE, NAMES) == {
        "best_pairwise_lung_iou": 0.8,
        "best_equivariance_error_pct": 7.0,
        STANDING: 0.8,
    }
    assert standing(rows[:1], RECIPE, NAMES) == {}, "no epoch is rankable yet"


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_a_trial_without_finite_values_fails_and_the_sampler_continues(names: tuple[str, ...]) -> None:
    metrics = [BEST.format(name) for name in names]
    modes = [str(RECIPE.objectives[name]) for name in names]
    metric, mode = (metrics, modes) if len(names) > 1 else (metrics[0], modes[0])
    sampler = Sampler({"lr": FloatDistribution(0, 1)}, metric=metric, mode=mode, seed=0)
    for i in range(24):  # TPE itself starts after ten
        drawn = sampler.suggest(str(i))
        assert drawn is not None
        told: dict[str, Any] = dict.fromkeys(metrics, drawn["lr"]) | {"training_iteration": 1}
        if i % 4 == 0:
            told |= {metrics[-1]: math.nan}
            if i % 8 == 0:  # no epoch is rankable
                told = {"training_iteration": 1}
        sampler.on_trial_result(str(i), told)
        sampler.on_trial_complete(str(i), *[(told, False), (None, True), ({"done": True}, False)][max(0, i - 21)])
    assert sampler._ot_study is not None
    states = [trial.state for trial in sampler._ot_study.trials]
    assert [state == TrialState.FAIL for state in states] == [i % 4 == 0 or i > 21 for i in range(24)]
    assert set(states) == {TrialState.FAIL, TrialState.COMPLETE}


def decisions(recipe: AlignRecipe, options: SearchOptions, values: list[list[float | None]]) -> list[list[str]]:
    """What ASHA says to each epoch of each trial, one trial after the other. None: the epoch is not rankable."""
    asha: Any = early_stopping(recipe, options)
    said: list[list[str]] = []
    for number, epochs in enumerate(values):
        trial: Any = SimpleNamespace(trial_id=str(number))
        asha.on_trial_add(None, trial)
        rows: list[dict[str, Any]] = [
            {
                "epoch": epoch,
                "rankable": value is not None,
                **({"pairwise_lung_iou": value} if value is not None else {}),
            }
            for epoch, value in enumerate(epochs, 1)
        ]
        told = [row | standing(rows[: row["epoch"]], recipe, ()) for row in rows]
        said.append([asha.on_trial_result(None, trial, result) for result in told])
    return said


def first_stop(recipe: AlignRecipe, options: SearchOptions) -> int | None:
    """The epoch at which a trial that is always worse than one before it is stopped."""
    last = decisions(recipe, options, [[0.9] * recipe.total_epochs, [0.1] * recipe.total_epochs])[-1]
    return last.index("STOP") + 1 if "STOP" in last else None


def test_no_trial_is_stopped_before_its_last_stage() -> None:
    assert first_stop(RECIPE, SearchOptions()) == 7
    assert first_stop(RECIPE, SearchOptions(grace_period=2)) == 8
    assert first_stop(RECIPE, SearchOptions(grace_period=9)) == 10
    assert first_stop(RECIPE, SearchOptions(grace_period=50)) == 10
    assert first_stop(AlignRecipe(epochs=20), SearchOptions()) == 5
    assert first_stop(AlignRecipe(epochs=2), SearchOptions()) == 1


@pytest.mark.filterwarnings("error")
def test_trials_without_a_rankable_network_stop_no_other_trial() -> None:
    refused: list[float | None] = [None] * 10
    ranked: list[float | None] = [*[None] * 6, *[0.5] * 4]
    said = decisions(RECIPE, SearchOptions(), [refused, refused, refused, ranked, [*[None] * 6, *[0.4] * 4]])
    assert {word for trial in said for word in trial} == {"CONTINUE"}
    said = decisions(RECIPE, SearchOptions(), [ranked, ranked, ranked, refused])
    assert [("STOP" in trial) for trial in said] == [False, False, False, True]


def test_a_trial_is_ranked_by_its_best_epoch_so_far() -> None:
    said = decisions(AlignRecipe(epochs=4), SearchOptions(grace_period=3), [[0.5] * 4, [0.1, 0.6, 0.2, 0.2]])
    assert "STOP" not in said[1]
