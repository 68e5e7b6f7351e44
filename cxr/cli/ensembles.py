"""Deep ensembles: training their members side by side, joining checkpoints, comparing members and ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import ensemble as study
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.training_jobs import connect, ensure_shards, picture, print_result, resolve_environment, training_record
from cxr.data import shards
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.evaluation.run import Run, Split, read_run
from cxr.families import checkpoint
from cxr.families.base import Recipe
from cxr.families.checkpoint import Checkpoint
from cxr.families.ensemble import check_members, join
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Member, Panel
from cxr.inference.score import score
from cxr.training.options import RunOptions
from cxr.training.sweep import Trained, train_all

Changes = Mapping[str, Any]
ENSEMBLE = "ensemble"  # its name beside those of the members


def member_changes(recipe: Recipe, members: int) -> list[Changes]:
    """The settings in which each member differs from `recipe`: seeds count up, and members cycle through folds."""
    cycles = recipe.folds and recipe.fold is None
    return [
        {"seed": recipe.seed + number, **({"fold": number % recipe.folds} if cycles else {})}
        for number in range(members)
    ]


def train_ensemble(
    recipe: Recipe,
    changes: Sequence[Changes],
    archive: ArchiveOptions,
    run: RunOptions,
    out: str,
) -> dict[str, Any]:
    """Train the members in OUT/member-0 …, join the finished ones in OUT/checkpoint; returns the result.json.

    Args:
        changes: settings in which each member differs from `recipe`.

    Raises:
        UserError: networks of these recipes cannot form an ensemble, or a mistake in the input.
        RuntimeError: no member finished.
    """
    recipes = [recipe.replace(**change) for change in changes]
    check_members(recipes)
    if archive.stream:
        raise UserError(
            "--members needs shards, on whose validation images thresholds of the ensemble are chosen: omit --stream"
        )
    largest = max(recipes, key=lambda member: member.size)
    archive = archive.with_headers(out)
    inputs = check_inputs(largest, archive, out)
    out = inputs.out
    connect(out, archive, run)
    say_plan(TrainOptions(out=out, recipe=largest, run=run, data=archive, members=len(recipes)), inputs.images)
    resolved = resolve_environment(largest, out, run)
    data = ensure_shards(archive, out, largest)
    named = {f"member-{number}": resolved.replace(**change) for number, change in enumerate(changes)}
    trained = train_all(named, None, data, out, run, reading=archive.reading, continue_on_failure=True)
    if not trained:
        raise RuntimeError(f"all {len(named)} members failed; see the messages above")
    for member in trained:
        print(f"checkpoint of {member.name}: {member.checkpoint}", flush=True)
    uris = {member.name: member.checkpoint for member in trained}
    return {
        **join_checkpoints(uris, data, out),
        "failed": sorted(set(named) - set(uris)),
        "trained": {name: training_record(member) for name, member in named.items()},
    }


def join_checkpoints(uris: Mapping[str, str], data: str, out: str) -> dict[str, Any]:
    """Join the checkpoints of the members, by name, in OUT/checkpoint, and compare their scores; returns the
    result.json.

    Args:
        data: shards.
    """
    members = [checkpoint.load(uri) for uri in uris.values()]
    ensemble = join(members, data, storage.join(out, "checkpoint"), best_device())
    comparison = compare_members(uris, ensemble, data, out)
    has_validation_images = bool(shards.read_info(data).rows("val"))
    pictures = picture(ensemble.uri, data, out) if has_validation_images else []
    print_result(ensemble.about["metrics"], ensemble.uri, pictures)
    return {
        "checkpoint": ensemble.uri,
        "members": dict(uris),
        "data": data,
        "metrics": ensemble.about["metrics"],
        "comparison": comparison,
        "pictures": pictures,
    }


def compare_members(uris: Mapping[str, str], ensemble: Checkpoint, data: str, out: str) -> dict[str, Any] | None:
    """Score held-out images with members and ensemble; print and return their metrics. None if no held-out image has
    ground truth."""
    images = study.held_out(data, ensemble.recipe)
    if images is None:
        print(
            f"note: no test or validation image of {data} has ground truth for the scores, so the members were not "
            f"compared",
            flush=True,
        )
        return None
    if images.split == "val":
        print(
            "note: no test image has ground truth, so the members are compared on validation images. Their best "
            "epochs and thresholds were selected on these images and, with folds, some members were trained on them",
            flush=True,
        )
    runs = score_all(
        {**uris, ENSEMBLE: ensemble.uri}, data, images.split, f"{out}/scored-{ensemble.about['sha256'][:12]}"
    )
    together = runs.pop(ENSEMBLE)
    comparison = study.compare(runs, together, images)
    print(f"{comparison.images:,} images of the {comparison.split} split, {comparison.patients:,} patients")
    print(comparison.table(), flush=True)
    return comparison.describe()


def score_all(
    uris: Mapping[str, str], data: str, split: Split, out: str, *, save_embeddings: bool = False
) -> dict[str, Run]:
    """The runs of several checkpoints, which score a split of shards in one pass."""
    panel = Panel(tuple(Member(name, uri) for name, uri in uris.items()))
    score(data, panel, out, ScoreOptions(split=split, max_rejects=0, save_embeddings=save_embeddings))
    return {name: read_run(out, name) for name in uris}


def score_seeds(trained: Sequence[Trained], name: str, data: str, split: Split, out: str) -> list[Run]:
    """The runs of the networks of one recipe of a study, one per seed, which score a split of shards in one pass."""
    uris = {f"seed-{network.seed}": network.checkpoint for network in trained if network.name == name}
    return list(score_all(uris, data, split, storage.join(out, name, f"scored-{len(uris)}")).values())
