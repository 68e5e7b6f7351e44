"""Ensembles of family `detect`: training members, joining their checkpoints, comparing members and ensemble."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import detection
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment, training_record
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.checkpoint import Checkpoint
from cxr.families.detect import DetectRecipe
from cxr.models.yolo import YoloEnsemble, YoloSize
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all


def member_recipes(
    recipe: DetectRecipe, members: int, architectures: Sequence[YoloSize] = (), sizes: Sequence[int] = ()
) -> dict[str, DetectRecipe]:
    """The recipe of each member by name. Seeds count up; members cycle through folds, architectures and sizes."""
    architectures, sizes = architectures or (recipe.architecture,), sizes or (recipe.size,)
    return {
        f"member-{number}": recipe.replace(
            seed=recipe.seed + number,
            fold=number % recipe.folds if recipe.folds else None,
            architecture=architectures[number % len(architectures)],
            size=sizes[number % len(sizes)],
        )
        for number in range(members)
    }


def train_ensemble(
    recipes: Mapping[str, DetectRecipe], archive: ArchiveOptions, run: RunOptions, out: str, *, test_images: int = 0
) -> dict[str, Any]:
    """Train the members in OUT/member-0 …, join the finished ones in OUT/checkpoint; returns the result.json.

    Args:
        test_images: number of held-out images on which the ensemble and its members are compared; 0: all.

    Raises:
        RuntimeError: no member finished.
    """
    largest = max(recipes.values(), key=lambda recipe: recipe.size)
    archive = archive.with_headers(out)
    out = check_inputs(largest, archive, out)
    connect(out, archive, run)
    ready = resolve_environment(largest, out, run)
    data = ensure_shards(archive, out, largest)
    recipes = {
        name: recipe.replace(lung_crop=ready.lung_crop, pretrained=ready.pretrained)
        for name, recipe in recipes.items()
    }
    trained = train_all(recipes, None, data, out, run, reading=archive.reading, continue_on_failure=True)
    if not trained:
        raise RuntimeError(f"all {len(recipes)} members failed; see the messages above")
    uris = {member.name: member.checkpoint for member in trained}
    for name, uri in uris.items():
        print(f"checkpoint of {name}: {uri}", flush=True)
    members = {name: checkpoint.load(uri) for name, uri in uris.items()}
    ensemble = save_ensemble(list(members.values()), storage.join(out, "checkpoint"))
    print(f"checkpoint of the ensemble of {len(members)} members: {ensemble}", flush=True)
    return {
        "checkpoint": ensemble,
        "members": uris,
        "failed": sorted(set(recipes) - set(uris)),
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
        "metrics": compare_members(members, ensemble, data, test_images),
    }


def compare_members(members: Mapping[str, Checkpoint], ensemble: str, data: str, limit: int) -> dict[str, float]:
    """Print and return the ensemble's gain over its members; {} if no held-out image has boxes."""
    held_out = detection.held_out(data, limit)
    if held_out is None:
        print(
            f"note: {data} has no test or validation images with boxes, so the members were not compared", flush=True
        )
        return {}
    split, xrays = held_out
    if split == "val":
        print(
            "note: no test image has boxes, so the members are compared on validation images. Their best epochs were "
            "selected on these images and, with folds, some members were trained on them",
            flush=True,
        )
    comparison = detection.compare(members, checkpoint.load(ensemble), xrays, best_device())
    print(f"{comparison.images:,} images of the {split} split, {comparison.patients:,} patients", flush=True)
    print(detection.table(comparison), flush=True)
    return detection.metrics(comparison)


def save_ensemble(members: Sequence[Checkpoint], target: str) -> str:
    """Join several checkpoints of family detect into one at the URI `target`.

    Raises:
        UserError: they have different findings, crops or enhancement.
    """
    first, recipes = members[0], [member.recipe for member in members]
    for member, recipe in zip(members, recipes, strict=True):
        alike = recipe.enhancement == first.recipe.enhancement and recipe.lung_crop == first.recipe.lung_crop
        if member.findings != first.findings or not alike:
            raise UserError(
                f"{member.uri} and {first.uri} cannot form an ensemble: expected the same findings, crop and "
                f"enhancement; train the members with the same settings"
            )
    recipe = first.recipe.replace(
        members=tuple(json.dumps(recipe.to_dict()) for recipe in recipes), size=max(recipe.size for recipe in recipes)
    )
    network = recipe.network(first.findings)
    assert isinstance(network, YoloEnsemble)
    for own, member in zip(network.members, members, strict=True):
        own.load_state_dict(member.network.state_dict())
    metrics = {f"member-{i}/{k}": v for i, member in enumerate(members) for k, v in member.about["metrics"].items()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(
            Path(folder), recipe, recipe.task(network), network.state_dict(), findings=first.findings, metrics=metrics
        )
        storage.upload_folder(Path(folder), target)
    return target
