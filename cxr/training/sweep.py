"""train_all(): several recipes, each with several seeds, trained by fit(), as many at once as the cluster holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cxr import storage
from cxr.data import shards
from cxr.errors import UserError
from cxr.families import checkpoint_files, recipe_from_dict
from cxr.families.base import Recipe
from cxr.runtime import console
from cxr.runtime.user_errors import user_error_in
from cxr.training.fit import fit, room
from cxr.training.options import RunOptions

ABOUT, ARCHIVE = "study.json", "archive"
RUN_CPU = 0.01  # of the process that looks after a run; its workers hold the rest


@dataclass(frozen=True)
class Trained:
    """One run of a study."""

    name: str
    seed: int
    checkpoint: str


def train_all(
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int] | None,
    archive: str,
    out: str,
    run: RunOptions | None = None,
    *,
    source: str = "auto",
    spared: bool = False,
) -> list[Trained]:
    """Train each recipe with each seed in OUT/NAME/seed-SEED; what an earlier call has finished is kept.

    Runs that were killed go on from their last checkpoint.

    Args:
        seeds: None: each recipe with its own.
        spared: a run that fails is told of, and missing from what is returned; the others go on.

    Raises:
        UserError: OUT holds runs of other recipes or archives, a mistake in a run, or a cluster too small for one.
    """
    run = run or RunOptions()
    _check_same(recipes, archive, out)
    planned = [
        (name, seed, storage.join(out, name, f"seed-{seed}"))
        for name, recipe in recipes.items()
        for seed in seeds or (recipe.seed,)
    ]
    todo = [one for one in planned if not _finished(one[2])]
    fits = room(run, raw=not shards.is_shards(storage.normalize(archive)), beside=RUN_CPU)
    start = ray.remote(num_cpus=RUN_CPU, max_retries=run.max_failures)(_train_one)
    running: dict[Any, str] = {}
    for number, (name, seed, folder) in enumerate(todo, 1):
        if len(running) == fits:
            _wait(running, spared)
        console.say(f"run {number} of {len(todo)}: {name}, seed {seed}")
        running[start.remote(recipes[name].replace(seed=seed).to_dict(), archive, folder, run, source)] = folder
    while running:
        _wait(running, spared)
    return [
        Trained(name, seed, storage.join(folder, "checkpoint")) for name, seed, folder in planned if _finished(folder)
    ]


def _finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, "checkpoint", checkpoint_files.ABOUT))


def _check_same(recipes: Mapping[str, Recipe], archive: str, out: str) -> None:
    """Keep what the study compares, to which recipes may be added; raise UserError where OUT holds another."""
    about, archive = storage.join(out, ABOUT), storage.normalize(archive)
    before: dict[str, Any] = storage.read_json(about) if storage.exists(about) else {ARCHIVE: archive}
    changed = [f"{ARCHIVE} was {before[ARCHIVE]}, is {archive}"] if before[ARCHIVE] != archive else []
    for name in (name for name in recipes if name in before):
        changed += [f"{name}: {change}" for change in recipes[name].changes_from(before[name])]
    if changed:
        raise UserError(f"{out} holds a study of other settings ({'; '.join(changed)}): give another --out, or these")
    storage.write_json(about, {**before, **{name: recipe.to_dict() for name, recipe in recipes.items()}})


def _wait(running: dict[Any, str], spared: bool) -> None:
    """Until one run has ended, which leaves `running`; with `spared`, however it ended."""
    (done,), _ = ray.wait(list(running), num_returns=1)
    folder = running.pop(done)
    try:
        ray.get(done)
    except RayTaskError as error:
        mistake = user_error_in(error)
        if spared:
            console.note(f"{folder} failed and is left out: {mistake or error.cause}")
            return
        if mistake:
            raise UserError(f"{folder}: {mistake}") from error
        raise


def _train_one(recipe: dict[str, Any], archive: str, folder: str, run: RunOptions, source: str) -> None:
    again = replace(run, resume=storage.exists(storage.join(folder, "train")))
    fit(recipe_from_dict(recipe), archive, folder, again, source=source)
