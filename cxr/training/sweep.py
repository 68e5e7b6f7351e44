"""train_all(): several recipes, each with several seeds, trained as many at a time as the cluster can hold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cxr import storage
from cxr.data import shards
from cxr.errors import ClusterError, UserError
from cxr.families import checkpoint_files, recipe_from_dict
from cxr.families.base import Recipe
from cxr.runtime import console
from cxr.runtime.progress import duration
from cxr.runtime.user_errors import PROCESS_DEATHS, user_error_in
from cxr.sources.options import ALL_IMAGES, ReadOptions
from cxr.training import mlflow_log
from cxr.training.fit import fit, room, uses_gpu
from cxr.training.options import RunOptions
from cxr.training.training_data import select_images

ABOUT, ARCHIVE = "study.json", "archive"  # ARCHIVE: URIs by the names of the recipes
RUN_CPU = 0.01  # of the process that looks after a run of several workers, which hold the rest


@dataclass(frozen=True)
class Trained:
    """One run of a study."""

    name: str
    seed: int
    checkpoint: str


def train_all(
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int] | None,
    archive: str | Mapping[str, str],
    out: str,
    run: RunOptions | None = None,
    *,
    reading: ReadOptions = ALL_IMAGES,
    continue_on_failure: bool = False,
) -> list[Trained]:
    """Train each recipe with each seed in OUT/NAME/seed-SEED; runs that an earlier call finished are kept.

    Runs that were killed resume from their last checkpoint.

    Args:
        seeds: None: each recipe with its own.
        archive: the URI of an archive or shards, or of each recipe's own, by its name.
        continue_on_failure: report a run that fails and leave it out of the result; the other runs continue.

    Raises:
        UserError: OUT contains runs of other recipes or archives, a mistake in a run, or a cluster too small for one.
    """
    run = run or RunOptions()
    archives = _by_name(recipes, archive)
    _check_same(recipes, archives, out)
    planned = [
        (name, seed, storage.join(out, name, f"seed-{seed}"))
        for name, recipe in recipes.items()
        for seed in seeds or (recipe.seed,)
    ]
    todo = [item for item in planned if not _finished(item[2])]
    selections = {
        uri: select_images(
            uri,
            [recipe for name, recipe in recipes.items() if archives[name] == uri],
            storage.join(out, f"selections-{number}.npz"),
        )
        for number, uri in enumerate(sorted({archives[name] for name, _, _ in todo}))
    }
    fits = room(run, raw=not all(map(shards.is_shards, {*archives.values()})), beside=RUN_CPU)
    mlflow_log.create_experiment()
    start = ray.remote(max_retries=run.max_failures, **_resources(run))(_train_one)
    running: dict[Any, str] = {}
    progress = RunProgress(len(todo), fits)
    for number, (name, seed, folder) in enumerate(todo, 1):
        if len(running) == fits:
            progress.finish(_wait(running, continue_on_failure))
        label = f"{name}, seed {seed}"
        console.say(f"run {number} of {len(todo)}: {label}")
        recipe = recipes[name].replace(seed=seed).to_dict()
        progress.start(folder)
        running[start.remote(recipe, archives[name], folder, run, reading, selections[archives[name]], label)] = (
            folder
        )
    while running:
        progress.finish(_wait(running, continue_on_failure))
    return [
        Trained(name, seed, storage.join(folder, "checkpoint")) for name, seed, folder in planned if _finished(folder)
    ]


class RunProgress:
    """Says after each run how many of all runs have ended, and how long the others will take.

    Args:
        runs: their number.
        at_once: how many of them the cluster can hold.
    """

    def __init__(self, runs: int, at_once: int) -> None:
        self.runs, self.at_once = runs, at_once
        self._started: dict[str, float] = {}
        self._seconds: list[float] = []

    def start(self, run: str) -> None:
        self._started[run] = time.monotonic()

    def finish(self, run: str) -> None:
        self._seconds.append(time.monotonic() - self._started.pop(run))
        ended = len(self._seconds)
        left = f", {duration(self.seconds_left())} left" if ended < self.runs else ""
        console.say(f"{ended} of {self.runs} runs have ended{left}")

    def seconds_left(self) -> float:
        """Estimated as if all runs took as long as those that have ended."""
        mean, now = sum(self._seconds) / len(self._seconds), time.monotonic()
        running = [max(0.0, mean - (now - started)) for started in self._started.values()]
        waiting = self.runs - len(self._seconds) - len(running)
        return max([(sum(running) + waiting * mean) / self.at_once, *running])


def _finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, "checkpoint", checkpoint_files.ABOUT))


def _resources(run: RunOptions) -> dict[str, Any]:
    """Of the process of a run. One worker trains in this process, as in a search: a controller and a worker would be
    two more processes, whose start takes longer than many a small network trains."""
    if run.max_workers > 1:
        return {"num_cpus": RUN_CPU}
    return {"num_cpus": run.resources_per_worker["CPU"], "num_gpus": float(uses_gpu(run))}


def _by_name(recipes: Mapping[str, Recipe], archive: str | Mapping[str, str]) -> dict[str, str]:
    """The normalized URI of each recipe's archive."""
    return {name: storage.normalize(archive if isinstance(archive, str) else archive[name]) for name in recipes}


def _check_same(recipes: Mapping[str, Recipe], archive: str | Mapping[str, str], out: str) -> None:
    """Write what the study compares. Recipes may be added; raises UserError if OUT contains a different study."""
    about, archives = storage.join(out, ABOUT), _by_name(recipes, archive)
    before: dict[str, Any] = storage.read_json(about) if storage.exists(about) else {ARCHIVE: {}}
    changed = []
    for name in (name for name in recipes if name in before):
        was = before[ARCHIVE][name]
        changed += [f"{name}: {ARCHIVE} was {was}, is {archives[name]}"] if was != archives[name] else []
        changed += [f"{name}: {change}" for change in recipes[name].changes_from(before[name])]
    if changed:
        raise UserError(
            f"{out} contains a study with different settings ({'; '.join(changed)}): use another --out, or the same "
            f"settings"
        )
    settings = {name: recipe.to_dict() for name, recipe in recipes.items()}
    storage.write_json(about, {**before, ARCHIVE: {**before[ARCHIVE], **archives}, **settings})


def _wait(running: dict[Any, str], continue_on_failure: bool) -> str:
    """Wait until a run has ended, remove it from `running` and return its folder; with `continue_on_failure`, report
    its failure."""
    (done,), _ = ray.wait(list(running), num_returns=1)
    folder = running.pop(done)
    try:
        ray.get(done)
    except (RayTaskError, *PROCESS_DEATHS) as error:
        mistake, died = user_error_in(error), isinstance(error, PROCESS_DEATHS)
        if continue_on_failure:
            reason = f"its process died ({type(error).__name__})" if died else getattr(error, "cause", error)
            console.note(f"{folder} failed; continuing without it: {mistake or reason}")
            return folder
        if mistake:
            raise UserError(f"{folder}: {mistake}") from error
        if died:
            raise ClusterError(
                f"{folder}: its process died more often than --max-failures allows ({type(error).__name__}). Most "
                f"likely a machine was lost, or is short of memory: check it, and run the same command again"
            ) from error
        raise
    return folder


def _train_one(
    recipe: dict[str, Any],
    archive: str,
    folder: str,
    run: RunOptions,
    reading: ReadOptions,
    selections: str,
    label: str,
) -> None:
    fit(
        recipe_from_dict(recipe),
        archive,
        folder,
        run,
        reading=reading,
        resume=storage.exists(storage.join(folder, "train")),
        in_process=run.max_workers == 1,
        label=f"{label}: train",
        selections=selections,
    )
