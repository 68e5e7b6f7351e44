"""search(): Ray Tune with Optuna around fit(); one trial is one Ray Train run."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import BaseDistribution
from ray import tune
from ray._private import worker as ray_worker
from ray.train import Checkpoint, UserCallback
from ray.tune import ResultGrid
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from cxr import checkpoint, shards, storage
from cxr.errors import UserError
from cxr.recipes import recipe_from_dict
from cxr.recipes.base import Recipe
from cxr.report.trials import Trial
from cxr.train import RunOptions, fit
from cxr.train.fit import room
from cxr.train.log import best_row, read_metrics

NAME, ABOUT, FAILED = "search", "search.json", "failed.json"
TRIAL_CPU = 0.01  # of the process that looks after a trial; its workers hold the rest
TRIALS = "trials"  # folder of the trials' runs


class Failed(RuntimeError):
    """A trial that failed by itself, which would end the same way in a second attempt."""


class Mismatch(RuntimeError):
    """A worker trained with another setting than the search had drawn."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the search goes about."""

    trials: int = 8
    """Settings to try."""
    search_seed: int = 0
    """Seed of the sampler (TPE)."""
    grace: int = 0
    """Epochs that every trial gets before it may be stopped early; 0 for a quarter of the recipe's epochs."""
    at_once: int | None = None
    """Trials to run at the same time; unset for as many as the cluster has room for."""


class CheckApplied(UserCallback):
    """Ends a trial whose workers report other settings than were drawn."""

    def __init__(self, drawn: Mapping[str, Any]) -> None:
        self.drawn = dict(drawn)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        for rank, reported in enumerate(metrics):
            check_applied(self.drawn, reported["applied"], rank)


def check_applied(drawn: Mapping[str, Any], applied: Mapping[str, Any], rank: int = 0) -> None:
    """Raise Mismatch unless every drawn value is what the worker of `rank` says it trained with."""
    wrong = [f"{k}: drawn {v!r}, applied {applied.get(k)!r}" for k, v in drawn.items() if applied.get(k) != v]
    if wrong:
        raise Mismatch(f"worker {rank} trained with another recipe than was drawn: {'; '.join(wrong)}")


def search(
    recipe: Recipe,
    archive: str,
    out: str,
    options: SearchOptions | None = None,
    run: RunOptions | None = None,
    *,
    space: Mapping[str, BaseDistribution] | None = None,
    source: str = "auto",
) -> list[Trial]:
    """Try settings drawn from `space` (default: the recipe's), each by `fit`; the best come first.

    Each trial lies in OUT/trials/ID as `fit` leaves it. With `run.resume`, a search that was killed goes on:
    finished trials are kept, interrupted ones continue from their last checkpoint.

    Raises:
        UserError: OUT holds a search already and `run.resume` is off, or the cluster cannot hold one trial.
    """
    options, run = options or SearchOptions(), run or RunOptions()
    out = storage.normalise(out)
    _check_dashboard()
    fits = room(run, raw=not shards.is_shards(storage.normalise(archive)), beside=TRIAL_CPU)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the job, not just the wait for its trials
    trainable = _trainable(recipe, archive, out, run, source)
    if run.resume:
        tuner = _restored(trainable, recipe, out)
    else:
        space = dict(space or recipe.search_space())
        tuner = _new(trainable, recipe, out, space, options, min(options.at_once or fits, fits), run.max_failures)
    return ranked(tuner.fit(), recipe, out)


def _new(
    trainable: Any,
    recipe: Recipe,
    out: str,
    space: dict[str, BaseDistribution],
    options: SearchOptions,
    at_once: int,
    max_failures: int,
) -> tune.Tuner:
    if storage.exists(storage.join(out, NAME)):
        raise UserError(f"{out} holds a search already: give --resume to go on with it, or another --out")
    if not space:
        raise UserError(f"family {recipe.family} names no settings to search")
    grace = min(options.grace or max(1, recipe.epochs // 4), recipe.epochs)
    storage.write_json(storage.join(out, ABOUT), recipe.to_dict())
    # max_t lies beyond the last epoch: Tune would otherwise stop trials there, before they end by themselves.
    asha = ASHAScheduler(time_attr="epoch", max_t=recipe.epochs + 1, grace_period=grace, reduction_factor=3)
    config = tune.TuneConfig(
        metric=recipe.monitor,
        mode=recipe.mode,
        num_samples=options.trials,
        max_concurrent_trials=at_once,
        search_alg=OptunaSearch(space, metric=recipe.monitor, mode=recipe.mode, seed=options.search_seed),
        scheduler=asha,
    )
    path, files = storage.ray_storage(out)
    lost = tune.FailureConfig(max_failures=max_failures)  # with the machine they ran on
    kept = tune.RunConfig(name=NAME, storage_path=path, storage_filesystem=files, failure_config=lost, verbose=0)
    return tune.Tuner(trainable, tune_config=config, run_config=kept)


def _restored(trainable: Any, recipe: Recipe, out: str) -> tune.Tuner:
    path, files = storage.ray_storage(storage.join(out, NAME))
    if not tune.Tuner.can_restore(path, storage_filesystem=files):
        raise UserError(f"{out} holds no search to resume: give the --out of the search, or leave --resume out")
    changed = recipe.changes_from(storage.read_json(storage.join(out, ABOUT)))
    if changed:
        raise UserError(
            f"the search to resume began otherwise ({'; '.join(changed)}), and its trials must compare: "
            f"give the same settings, or another --out"
        )
    return tune.Tuner.restore(
        path, trainable=trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=files
    )


def _check_dashboard() -> None:
    node = ray_worker._global_node
    if node is None or not node.webui_url:
        raise UserError(
            "this Ray cluster runs without its dashboard, which Tune needs to free the workers of stopped trials: "
            "start the head with --include-dashboard=true"
        )


def _trainable(recipe: Recipe, archive: str, out: str, run: RunOptions, source: str) -> Any:
    """The function that Tune calls for each trial: `fit` with what was drawn, told apart by the trial's id.

    Tune starts it again if it dies with its machine, and would as well if it failed: then it fails again at once.
    """
    base, this_search = recipe.to_dict(), secrets.token_hex(8)

    def trial(drawn: dict[str, Any]) -> None:
        folder = storage.join(out, TRIALS, tune.get_context().get_trial_id())
        with _once(storage.join(folder, FAILED), this_search):
            fit(
                recipe_from_dict(base).replace(**drawn),
                archive,
                folder,
                replace(run, resume=storage.exists(storage.join(folder, "train"))),
                source=source,
                callbacks=[CheckApplied(drawn), TuneReportCallback()],
            )

    return tune.with_resources(trial, {"CPU": TRIAL_CPU})


@contextmanager
def _once(note: str, search: str) -> Iterator[None]:
    """Keep a failure inside the block at `note`, and raise it at once where the same search comes back."""
    if storage.exists(note) and (before := storage.read_json(note))["search"] == search:
        raise Failed(before["reason"])
    try:
        yield
    except Exception as error:
        storage.write_json(note, {"search": search, "reason": str(error)})
        raise


def ranked(grid: ResultGrid, recipe: Recipe, out: str) -> list[Trial]:
    """All trials, the best first, failed ones last."""
    trials = [_trial(result, recipe, out) for result in grid]
    sign = -1 if recipe.mode == "max" else 1
    return sorted(trials, key=lambda t: (math.isnan(t.value), sign * t.value))


def _trial(result: Any, recipe: Recipe, out: str) -> Trial:
    trial_id = (result.metrics or {}).get("trial_id") or storage.name(result.path).split("_")[1]
    folder = storage.join(out, TRIALS, trial_id)
    rows = read_metrics(folder)
    drawn = dict(result.config or {})
    best = best_row(rows, recipe)
    if result.error is not None or best is None:
        reason = str(result.error or f"no epoch gave a finite {recipe.monitor}").strip().splitlines()[-1]
        return Trial(trial_id, f"failed: {reason}", len(rows), math.nan, drawn, {}, "")
    kept = _keep(folder, best["checkpoint"])
    metrics = checkpoint.read_about(kept)["metrics"]
    status = "done" if rows[-1]["epoch"] == recipe.epochs else "stopped early"
    return Trial(trial_id, status, len(rows), best[recipe.monitor], drawn, metrics, kept)


def _keep(folder: str, epoch: str) -> str:
    """The trial's best checkpoint under its stable name; a trial stopped early has not been given it yet."""
    kept = storage.join(folder, "checkpoint")
    if not storage.exists(storage.join(kept, checkpoint.ABOUT)):
        checkpoint.copy_for_scoring(storage.join(folder, "train", epoch), kept)
    return kept
