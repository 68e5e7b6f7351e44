"""search() on a local cluster: sampled values take effect, and a worker that applies other values fails its trial."""

from __future__ import annotations

import csv
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.reporting.trials import write_search_pictures, write_trials
from cxr.training.fit import room
from cxr.training.options import RunOptions, SearchOptions
from cxr.training.run_log import read_metrics
from cxr.training.search import TRIAL_CPU, search
from tests.made_shards import write_shards
from tests.ray_private import trial_values

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RECIPE = AlignRecipe(size=32, epochs=2, batch_size=8, backbone="conv3", lungs=False)
SPACE = {
    "structure_weight": FloatDistribution(0.1, 4.0),
    "parameterization": CategoricalDistribution(["similarity", "affine"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("tune") / "shards", {"train": 24, "val": 8}, size=32)


@pytest.mark.timeout(600)
def test_sampled_weights_take_effect_and_trials_are_ranked(made: str, tmp_path: Path) -> None:
    out = str(tmp_path / "search")
    trials = search(
        RECIPE, made, out, SearchOptions(trials=2, grace_period=2), RunOptions(cpus_per_worker=0.5), space=SPACE
    )
    assert len(trials) == 2
    assert [t.value for t in trials] == sorted((t.value for t in trials), reverse=True)
    assert len({t.sampled["structure_weight"] for t in trials}) == 2
    losses = {read_metrics(f"{out}/trials/{t.trial}")[0]["train/structure"] for t in trials}
    assert len(losses) == 2
    for trial in trials:
        recipe = checkpoint.load(trial.checkpoint).recipe
        assert {name: getattr(recipe, name) for name in SPACE} == trial.sampled
    write_trials(trials, "group_correlation", out)
    with (Path(out) / "trials.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [t.trial for t in trials]
    assert [Path(p).name for p in write_search_pictures(trials, SPACE, "group_correlation", True, out)] == [
        "parallel_coordinates.png"
    ]
    with pytest.raises(UserError, match="already contains a search"):
        search(RECIPE, made, out, SearchOptions(trials=1), space=SPACE)
    with pytest.raises(UserError, match="epochs was 2, is 3"):
        search(RECIPE.replace(epochs=3), made, out, resume=True, space=SPACE)


class Disobedient(AlignRecipe):
    """Receives the sampled settings and trains with others."""

    def replace(self, **changes: Any) -> Self:
        return super().replace(**(changes | {"structure_weight": 1.5}))


@pytest.mark.slow
def test_a_worker_that_applies_another_config_fails_its_trial(made: str, tmp_path: Path) -> None:
    from cxr.training import search as search_module

    original = search_module.recipe_from_dict
    search_module.recipe_from_dict = lambda values: Disobedient.from_dict(values)
    try:
        trials = search(
            RECIPE,
            made,
            str(tmp_path / "search"),
            SearchOptions(trials=1),
            RunOptions(cpus_per_worker=0.5),
            space=SPACE,
        )
    finally:
        search_module.recipe_from_dict = original
    assert trials[0].status.startswith("failed")
    assert "applied 1.5" in trials[0].status
    assert math.isnan(trials[0].value)
    assert trials[0].checkpoint == ""


class Weighed(AlignRecipe):
    """Offers two metrics that can disagree."""

    objectives: ClassVar[dict[str, Literal["min", "max"]]] = {
        "group_correlation": "max",
        "equivariance_error_pct": "min",
    }


def told(out: Path) -> list[list[float]]:
    """The values that Optuna received for each trial, from the sampler's last saved state."""
    state = max((out / "search").glob("searcher-state-*.pkl"), key=lambda path: path.stat().st_mtime)
    return trial_values(pickle.loads(state.read_bytes()))


@pytest.mark.slow
def test_two_objectives_are_compared_at_each_trials_best_epoch(made: str, tmp_path: Path) -> None:
    recipe, out = Weighed(**{**vars(RECIPE), "epochs": 3}), str(tmp_path / "search")
    options = SearchOptions(trials=3, objectives=tuple(Weighed.objectives))
    trials = search(recipe, made, out, options, RunOptions(cpus_per_worker=0.5), space=SPACE)
    assert [t.status for t in trials] == ["done"] * 3
    assert [t.value for t in trials] == sorted((t.value for t in trials), reverse=True)
    assert trials[0].on_front, "the best by one objective cannot be dominated"
    assert sorted(told(tmp_path / "search")) == sorted([t.metrics[n] for n in Weighed.objectives] for t in trials)
    run = RunOptions(cpus_per_worker=0.5)
    with pytest.raises(UserError, match="objectives was group_correlation equivariance_error_pct, is empty"):
        search(recipe, made, out, SearchOptions(trials=3), run, space=SPACE, resume=True)
    assert search(recipe, made, out, options, run, space=SPACE, resume=True) == trials


def test_as_many_trials_run_at_once_as_fit() -> None:
    assert room(RunOptions(cpus_per_worker=0.5), raw=False) == 4
    assert room(RunOptions(), raw=False, beside=TRIAL_CPU) == 2
    assert room(RunOptions(), raw=True) == 1
    assert room(RunOptions(workers=2), raw=False) == 1
    with pytest.raises(UserError, match="too few for a run of 4 workers"):
        room(RunOptions(workers=4), raw=False)
