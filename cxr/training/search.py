"""search(): Ray Tune with Optuna around fit(); one trial is one Ray Train run."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from optuna.distributions import BaseDistribution
from ray import tune
from ray.train import Checkpoint, UserCallback
from ray.tune import ResultGrid
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from cxr import storage
from cxr.data import shards
from cxr.errors import UserError
from cxr.families import checkpoint_files, recipe_from_dict
from cxr.families.base import Recipe
from cxr.runtime import console, ray_private
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling, ReadOptions
from cxr.training.fit import fit, room, uses_gpu
from cxr.training.mlflow_log import MlflowLog
from cxr.training.options import SEARCH, RunOptions, SearchOptions
from cxr.training.run_log import best_row, is_within_epoch, read_metrics
from cxr.training.training_data import SELECTIONS, select_images

if TYPE_CHECKING:
    from cxr.reporting.trials import Trial

ABOUT, FAILED = "search.json", "failed.json"
TRIAL_CPU = 0.01  # of the process that looks after a trial; its workers hold the rest
TRIALS = "trials"  # folder of the trials' runs
# Metrics of a trial's best epoch so far that are reported to Tune, once there is a rankable epoch: for the sampler,
# and the monitored metric for early stopping.
BEST, STANDING = "best_{}", "standing"


class TrialFailedError(RuntimeError):
    """A trial that failed by itself, which would end the same way in a second attempt."""


class SettingsMismatchError(RuntimeError):
    """A worker trained with another setting than the one sampled for its trial."""


class CheckApplied(UserCallback):
    """Ends a trial whose workers report other settings than the sampled ones."""

    def __init__(self, sampled: Mapping[str, Any]) -> None:
        self.sampled = dict(sampled)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        for rank, reported in enumerate(metrics):
            check_applied(self.sampled, reported["applied"], rank)


def check_applied(sampled: Mapping[str, Any], applied: Mapping[str, Any], rank: int = 0) -> None:
    """Raise SettingsMismatchError unless the worker of `rank` reports every sampled value as applied."""
    wrong = [f"{k}: sampled {v!r}, applied {applied.get(k)!r}" for k, v in sampled.items() if applied.get(k) != v]
    if wrong:
        raise SettingsMismatchError(
            f"worker {rank} trained with other settings than the sampled ones: {'; '.join(wrong)}"
        )


class ReportBest(UserCallback):
    """Reports the metrics of the trial's best epoch so far to Tune with every epoch; the final table shows them.

    They are read from the run's log, which `fit` writes first and which survives a restart.

    Args:
        in_process: training runs in the trial's own process, which Tune may end at a report.
    """

    def __init__(self, recipe: Recipe, folder: str, objectives: Sequence[str], *, in_process: bool) -> None:
        self.recipe, self.folder, self.objectives = recipe, folder, tuple(objectives)
        self.from_workers = None if in_process else TuneReportCallback()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if is_within_epoch(metrics[0]):
            return
        row = metrics[0] | standing(read_metrics(self.folder), self.recipe, self.objectives)
        if self.from_workers:
            self.from_workers.after_report(run_context, [row], checkpoint)
        else:
            tune.report(row)


class ShowTrials(tune.Callback):
    """Shows a line for each trial that ends, and a live line on a terminal."""

    def __init__(self, recipe: Recipe, trials: int) -> None:
        self.monitor, self.trials, self.ended = recipe.monitor, trials, 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        row = trial.last_result or {}
        value, epoch, epochs = row.get(BEST.format(self.monitor), math.nan), row.get("epoch", 0), row.get("epochs", 0)
        self._show(f"{self.monitor} {value:.4f} after {epoch} of {epochs} epochs", trial, value)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._show("failed", trial, math.nan)

    def _show(self, outcome: str, trial: Any, value: float) -> None:
        self.ended += 1
        text = f"trial {self.ended} of {self.trials} ({trial.trial_id}): {outcome}"
        console.event("trial", text, trial=trial.trial_id, metrics={self.monitor: value})
        if self.ended < self.trials:
            console.current().show_live_line("search", self.ended, self.trials, "trials")


def standing(rows: Sequence[dict[str, Any]], recipe: Recipe, objectives: Sequence[str]) -> dict[str, float]:
    """What is reported to Tune about a trial with these epochs, see BEST and STANDING; empty if none is rankable."""
    best = best_row(rows, recipe)
    if best is None:
        return {}
    measured = {BEST.format(name): best[name] for name in (recipe.monitor, *objectives) if name in best}
    return measured | {STANDING: best[recipe.monitor]}


class Sampler(OptunaSearch):
    """OptunaSearch for trials that may have no value: they fail, instead of counting as running forever."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if isinstance(self.metric, str) and self.metric in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        names = [self.metric] if isinstance(self.metric, str) else self.metric
        finite = all(math.isfinite((result or {}).get(name, math.nan)) for name in names)
        super().on_trial_complete(trial_id, result if finite else None, error or not finite)


def objectives_of(recipe: Recipe, options: SearchOptions) -> dict[str, Literal["min", "max"]]:
    """The metrics to optimize together, with their direction; {} if only the monitored metric counts.

    Raises:
        UserError: the family does not have a metric, or there is only one, or one twice.
    """
    names = options.objectives
    if names in ((), (recipe.monitor,)):
        return {}
    if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= set(recipe.objectives):
        offered = f"two or more of {', '.join(recipe.objectives)}, each once," if recipe.objectives else "none"
        raise UserError(
            f"--objectives: expected {offered} for family {recipe.family}, got {' '.join(names)}: correct or "
            f"omit the option"
        )
    return {name: recipe.objectives[name] for name in names}


def searched(recipe: Recipe, options: SearchOptions) -> dict[str, BaseDistribution]:
    """The settings to sample, with their distributions.

    Raises:
        UserError: a frozen setting is not searched anyway, or no setting is left to search.
    """
    space = recipe.active_search_space()
    if unknown := set(options.frozen_params) - set(space):
        stages = " and ".join(stage.name for stage in recipe.stages() if stage.name)
        raise UserError(
            f"frozen_params={' '.join(sorted(unknown))}: expected settings that this search samples, which are "
            f"{', '.join(space) or 'none'}{f' for the stages {stages}' * bool(stages)}"
        )
    if not (active := recipe.active_search_space(options.frozen_params)):
        raise UserError(
            f"frozen_params={' '.join(options.frozen_params)} leaves no setting of family {recipe.family} to search, "
            f"so that all trials would be equal: remove some of them from --frozen-params"
        )
    return active


class EarlyStopping(ASHAScheduler):
    """ASHA (Li et al. 2020) in which trials without a rankable epoch count as worse than all others."""

    def __init__(self, *, mode: str, **settings: Any) -> None:
        super().__init__(metric=STANDING, mode=mode, **settings)
        self._worst = 1e30 if mode == "min" else -1e30  # finite, since ASHA interpolates between values

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return super().on_trial_result(tune_controller, trial, self._complete(result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, self._complete(result))

    def _complete(self, result: dict[str, Any]) -> dict[str, Any]:
        return {STANDING: self._worst, **result}


def early_stopping(recipe: Recipe, options: SearchOptions) -> EarlyStopping:
    """Early stopping by each trial's best epoch so far, some epochs into the last stage."""
    last, unranked = recipe.total_epochs, recipe.unranked_epochs
    grace = unranked + (options.grace_period or max(1, (last - unranked) // 4))
    # max_t lies beyond the last epoch: Tune would otherwise stop trials there, before they end by themselves.
    return EarlyStopping(
        time_attr="epoch",
        mode=recipe.mode,
        max_t=last + 1,
        grace_period=min(grace, last),
        reduction_factor=3,
    )


def search(
    recipe: Recipe,
    archive: str,
    out: str,
    options: SearchOptions | None = None,
    run: RunOptions | None = None,
    *,
    space: Mapping[str, BaseDistribution] | None = None,
    reading: ReadOptions = ALL_IMAGES,
    labeling: Labeling = SOURCE_LABELS,
    resume: bool = False,
) -> list[Trial]:
    """Train with settings sampled from `space` (default: the recipe's), each in a trial; returns the best first.

    OUT/trials/ID has what `fit` writes for each trial. With `resume`, a search that was killed continues:
    finished trials are kept, interrupted ones continue from their last checkpoint.

    With `options.objectives` the sampler seeks the Pareto front, and no trial is stopped early; trials are still
    ranked, and their best epochs chosen, by the monitor.

    Raises:
        UserError: OUT contains a search and `resume` is off, the cluster cannot hold one trial, or the
            family does not offer the objectives.
    """
    options, run = options or SearchOptions(), run or RunOptions()
    objectives = objectives_of(recipe, options)
    out = storage.normalize(out)
    _check_dashboard()
    fits = room(
        run, raw=not shards.is_shards(storage.normalize(archive)), beside=0 if run.max_workers == 1 else TRIAL_CPU
    )
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may have no rankable epoch yet
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the job, not just the wait for its trials
    settings = {"archive": archive, **asdict(options), **asdict(run)}
    selections = select_images(storage.normalize(archive), [recipe], storage.join(out, SELECTIONS))
    with MlflowLog.begin(out, recipe, settings) as tracked:
        trainable = _trainable(recipe, archive, out, run, reading, labeling, tuple(objectives), tracked, selections)
        if resume:
            tuner = _restored(trainable, recipe, out, tuple(objectives))
        else:
            space = dict(space or searched(recipe, options))
            tuner = _new(
                trainable, recipe, out, space, options, min(options.max_concurrent_trials or fits, fits), run
            )
        from cxr.reporting.pareto import marked  # imports matplotlib, which a trial's process does without

        with console.current().hidden_stdout():  # Tune prints a box and paths of its own, however quiet it is set
            results = tuner.fit()
        trials = marked(ranked(results, recipe, out), objectives)
        _end_tracked(tracked, trials, out)
        return trials


def _end_tracked(tracked: MlflowLog, trials: Sequence[Trial], out: str) -> None:
    """End the MLflow runs of trials, since Tune may have stopped them, and send the best one's metrics."""
    if not tracked.active:
        return
    for trial in trials:
        log = MlflowLog.of(storage.join(out, TRIALS, trial.trial))
        if trial.status == "stopped early":
            log.send_best(trial.metrics, trial.checkpoint)
        log.end(failed=not trial.checkpoint, outcome=trial.status)
    if trials and trials[0].checkpoint:
        tracked.send_best(trials[0].metrics, trials[0].checkpoint)


def _new(
    trainable: Any,
    recipe: Recipe,
    out: str,
    space: dict[str, BaseDistribution],
    options: SearchOptions,
    at_once: int,
    run: RunOptions,
) -> tune.Tuner:
    if storage.exists(storage.join(out, SEARCH)):
        raise UserError(f"{out} already contains a search: use --resume to continue it, or another --out")
    objectives = objectives_of(recipe, options)
    if objectives:
        console.note("with several objectives, trials cannot be stopped early: each one trains for all of its epochs")
    storage.write_json(storage.join(out, ABOUT), recipe.to_dict() | {"objectives": list(objectives)})
    path, files = storage.ray_storage(out)
    lost = tune.FailureConfig(max_failures=run.max_failures)  # with the machine they ran on
    console.say(f"search: {options.trials} trials, up to {at_once} at a time")
    config = tune.RunConfig(
        name=SEARCH,
        storage_path=path,
        storage_filesystem=files,
        failure_config=lost,
        verbose=0,
        callbacks=[ShowTrials(recipe, options.trials)],
    )
    tune_config = _tune_config(recipe, space, options, at_once, reuse=run.max_workers == 1)
    return tune.Tuner(trainable, tune_config=tune_config, run_config=config)


def _tune_config(
    recipe: Recipe, space: dict[str, BaseDistribution], options: SearchOptions, at_once: int, *, reuse: bool
) -> tune.TuneConfig:
    """With `reuse`, a trial takes over the process of one that has ended, with all that it has imported."""
    objectives = objectives_of(recipe, options)
    metrics, modes = [BEST.format(name) for name in objectives], [str(mode) for mode in objectives.values()]
    metric, mode = (metrics, modes) if objectives else (BEST.format(recipe.monitor), recipe.mode)
    return tune.TuneConfig(
        reuse_actors=reuse,
        num_samples=options.trials,
        max_concurrent_trials=at_once,
        search_alg=Sampler(space, metric=metric, mode=mode, seed=options.search_seed),
        scheduler=None if objectives else early_stopping(recipe, options),
    )


def _restored(trainable: Any, recipe: Recipe, out: str, objectives: tuple[str, ...]) -> tune.Tuner:
    path, files = storage.ray_storage(storage.join(out, SEARCH))
    if not tune.Tuner.can_restore(path, storage_filesystem=files):
        raise UserError(f"{out} contains no search to resume: use the --out of the search, or omit --resume")
    began = storage.read_json(storage.join(out, ABOUT))
    changed, weighed = recipe.changes_from(began), tuple(began.get("objectives", ()))
    if weighed != objectives:
        changed.append(f"objectives was {' '.join(weighed) or 'empty'}, is {' '.join(objectives) or 'empty'}")
    if changed:
        raise UserError(
            f"the search to resume was started with different settings ({'; '.join(changed)}): "
            f"use the same settings, or another --out"
        )
    return tune.Tuner.restore(
        path, trainable=trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=files
    )


def _check_dashboard() -> None:
    if not ray_private.dashboard_url():
        raise UserError(
            "this Ray cluster runs without its dashboard, which Tune needs to stop the workers of stopped trials: "
            "start the head with --include-dashboard=true"
        )


def _trainable(
    recipe: Recipe,
    archive: str,
    out: str,
    run: RunOptions,
    reading: ReadOptions,
    labeling: Labeling,
    objectives: tuple[str, ...],
    search_log: MlflowLog,
    selections: str,
) -> Any:
    """The function that Tune calls for each trial: `fit` with its sampled settings, in a folder of its own.

    A trial of one worker trains in its own process: a controller and a worker would be two more processes, whose
    start takes longer than many a trial trains. Tune starts a trial again if it dies with its machine, and would as
    well if it failed: then it fails again at once.
    """
    base, this_search = recipe.to_dict(), secrets.token_hex(8)

    in_process = run.max_workers == 1

    def trial(sampled: dict[str, Any]) -> None:
        folder = storage.join(out, TRIALS, tune.get_context().get_trial_id())
        with _once(storage.join(folder, FAILED), this_search):
            mine = recipe_from_dict(base).replace(**sampled)
            fit(
                mine,
                archive,
                folder,
                run,
                reading=reading,
                labeling=labeling,
                callbacks=[CheckApplied(sampled), ReportBest(mine, folder, objectives, in_process=in_process)],
                resume=storage.exists(storage.join(folder, "train")),
                in_process=in_process,
                show_epochs=False,
                search_log=search_log,
                selections=selections,
            )

    worker = run.resources_per_worker | ({"GPU": 1} if uses_gpu(run) else {})
    return tune.with_resources(trial, worker if in_process else {"CPU": TRIAL_CPU})


@contextmanager
def _once(note: str, search: str) -> Iterator[None]:
    """Keep a failure inside the block at `note`, and raise it at once where the same search comes back."""
    if storage.exists(note) and (before := storage.read_json(note))["search"] == search:
        raise TrialFailedError(before["reason"])
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
    from cxr.reporting.trials import Trial

    trial_id = (result.metrics or {}).get("trial_id") or storage.name(result.path).split("_")[1]
    folder = storage.join(out, TRIALS, trial_id)
    rows = read_metrics(folder)
    sampled = dict(result.config or {})
    best = best_row(rows, recipe)
    if result.error is not None or best is None:
        reason = str(result.error or f"no epoch gave a finite {recipe.monitor}").strip().splitlines()[-1]
        return Trial(trial_id, f"failed: {reason}", len(rows), math.nan, sampled, {}, "")
    checkpoint = _keep(folder, best["checkpoint"])
    metrics = checkpoint_files.read_about(checkpoint)["metrics"]
    status = "done" if rows[-1]["epoch"] == recipe.total_epochs else "stopped early"
    return Trial(trial_id, status, len(rows), best[recipe.monitor], sampled, metrics, checkpoint)


def _keep(folder: str, epoch: str) -> str:
    """The trial's best checkpoint under its stable name; a trial stopped early has not been given it yet."""
    target = storage.join(folder, "checkpoint")
    if not storage.exists(storage.join(target, checkpoint_files.ABOUT)):
        checkpoint_files.copy_for_scoring(storage.join(folder, "train", epoch), target)
    return target
