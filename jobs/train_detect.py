"""Train YOLOv5 to find boxes around findings; one network, or several that vote.

python jobs/train_detect.py  # on a phantom archive: the smallest network, for CPUs

python jobs/train_detect.py --archive s3://xrays/vinbigdata --shard-size 640 --size 640 --architecture yolov5m \\
    --algorithm sgd --lr 0.01 --mosaic 1 --close-mosaic 10 --scale 0.5 --batch-size 16 --epochs 100 \\
    --out s3://xrays/detect --workers 8

python jobs/train_detect.py --archive s3://xrays/vinbigdata --shard-size 1024 --folds 5 --members 5 \\
    --architectures yolov5s yolov5m --sizes 640 1024 --out s3://xrays/ensemble  # as many at once as there is room for

Left to themselves the settings are for some hundred images and some thousand steps: AdamW, no mosaic. The first of
these commands gives those of Ultralytics, for long trainings on many images.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import detection
from cxr.cli.training_jobs import ArchiveOptions, make_ready, ready_to_begin, settled, train_job, training_record
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.checkpoint import Checkpoint
from cxr.families.detect import DetectRecipe
from cxr.models.yolo import YoloEnsemble, YoloSize
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_detect"
    """Folder or URI of the results."""
    members: int = 1
    """Networks to train, of which an ensemble is made: each with a seed of its own and, in turn, the next fold,
    architecture and size. One that fails is left out."""
    architectures: tuple[YoloSize, ...] = ()
    """Of members, in turn; left out, the recipe's."""
    sizes: tuple[int, ...] = ()
    """Of members, in turn; left out, the recipe's."""
    test_images: int = 1000
    """Images of the test split, spread evenly, by which an ensemble and its members are compared; 0: all. They are
    held in memory, and seen by this machine."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400))
    recipe: DetectRecipe = field(
        default_factory=lambda: DetectRecipe(
            size=256, epochs=20, batch_size=8, algorithm="adamw", lr=0.001, mosaic=0.0, close_mosaic=0, scale=0.3
        )
    )
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    if options.members > 1:
        return train_members(options)
    return train_job(options.recipe, options.data, options.run, options.out)


def members_of(options: Options) -> dict[str, DetectRecipe]:
    """The recipe of each member by name."""
    recipe = options.recipe
    architectures, sizes = options.architectures or (recipe.architecture,), options.sizes or (recipe.size,)
    return {
        f"member-{number}": recipe.replace(
            seed=recipe.seed + number,
            fold=number % recipe.folds if recipe.folds else None,
            architecture=architectures[number % len(architectures)],
            size=sizes[number % len(sizes)],
        )
        for number in range(options.members)
    }


def train_members(options: Options) -> dict[str, Any]:
    """Train the members, in OUT/member-0 …, and make OUT/checkpoint of those that were finished."""
    recipes = members_of(options)
    largest = max(recipes.values(), key=lambda recipe: recipe.size)
    out = ready_to_begin(largest, options.data, options.out, options.run)
    ready = settled(largest, out, options.run)
    data = make_ready(options.data, out, largest)
    recipes = {name: one.replace(lung_crop=ready.lung_crop, weights=ready.weights) for name, one in recipes.items()}
    source = options.data.source
    trained = train_all(recipes, None, data, out, options.run, source=source, spared=True)
    if not trained:
        raise RuntimeError(f"all {len(recipes)} members failed: their messages stand above")
    kept = {one.name: one.checkpoint for one in trained}
    for name, uri in kept.items():
        print(f"checkpoint of {name}: {uri}", flush=True)
    loaded = {name: checkpoint.load(uri) for name, uri in kept.items()}
    together = save_ensemble(list(loaded.values()), storage.join(out, "checkpoint"))
    print(f"checkpoint of {len(kept)} members together: {together}", flush=True)
    told = {"checkpoint": together, "members": kept, "failed": sorted(set(recipes) - set(kept)), "data": data}
    told["trained"] = {name: training_record(recipe) for name, recipe in recipes.items()}
    return told | {"metrics": compared(loaded, together, data, options.test_images)}


def compared(members: Mapping[str, Checkpoint], together: str, data: str, limit: int) -> dict[str, float]:
    """What the ensemble gains over its members, printed too; nothing where there are no images to see it by."""
    found = detection.held_out(data, limit)
    if found is None:
        print(
            f"note: {data} has no test or val images with boxes in shards: nothing to compare members by", flush=True
        )
        return {}
    split, xrays = found
    if split == "val":
        print(
            "note: no test images with boxes; validation images chose the members' epochs, or taught some", flush=True
        )
    device = best_device()
    judged = detection.compare(members, checkpoint.load(together), xrays, device)
    print(f"{judged.images:,} images of the {split} split, {judged.patients:,} patients", flush=True)
    print(detection.table(judged), flush=True)
    return detection.metrics(judged)


def save_ensemble(members: Sequence[Checkpoint], target: str) -> str:
    """One checkpoint of several of family detect, at the URI `target`.

    Raises:
        UserError: they find other findings, or see other images.
    """
    first, recipes = members[0], [one.recipe for one in members]
    for one, recipe in zip(members, recipes, strict=True):
        alike = recipe.enhancement == first.recipe.enhancement and recipe.lung_crop == first.recipe.lung_crop
        if one.findings != first.findings or not alike:
            raise UserError(f"{one.uri} has other findings than {first.uri}, or sees other images: train them alike")
    recipe = first.recipe.replace(
        members=tuple(json.dumps(one.to_dict()) for one in recipes), size=max(one.size for one in recipes)
    )
    network = recipe.network(first.findings)
    assert isinstance(network, YoloEnsemble)
    for own, one in zip(network.members, members, strict=True):
        own.load_state_dict(one.network.state_dict())
    metrics = {f"member-{i}/{k}": v for i, one in enumerate(members) for k, v in one.about["metrics"].items()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(
            Path(folder), recipe, recipe.task(network), network.state_dict(), findings=first.findings, metrics=metrics
        )
        storage.upload_folder(Path(folder), target)
    return target


if __name__ == "__main__":
    run_job(main, Options)
