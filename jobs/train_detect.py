"""Train YOLOv5 to find boxes around findings; one network, or several that vote.

python jobs/train_detect.py  # on a phantom archive: the smallest network, for CPUs

python jobs/train_detect.py --archive s3://xrays/vinbigdata --shard-size 640 --size 640 --architecture yolov5m \\
    --epochs 100 --out s3://xrays/detect --workers 8

python jobs/train_detect.py --archive s3://xrays/vinbigdata --shard-size 1024 --folds 5 --members 5 \\
    --architectures yolov5s yolov5m --sizes 640 1024 --out s3://xrays/ensemble  # as many at once as there is room for
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr import checkpoint, storage
from cxr.errors import UserError
from cxr.job import run_job
from cxr.models.yolo import YoloEnsemble, YoloSize
from cxr.recipes.detect import DetectRecipe
from cxr.study import train_all
from cxr.train import RunOptions
from cxr.workflow import ArchiveOptions, make_ready, ready_to_begin, settled, train_job


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
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400))
    recipe: DetectRecipe = field(
        default_factory=lambda: DetectRecipe(size=256, epochs=20, warmup=0.1, close_mosaic=5)
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
    out = ready_to_begin(largest, options.data, options.out)
    data = make_ready(options.data, out, largest)
    ready = settled(largest, out, options.run)
    recipes = {name: one.replace(lung_crop=ready.lung_crop, weights=ready.weights) for name, one in recipes.items()}
    source = options.data.source
    trained = train_all(recipes, None, data, out, options.run, source=source, spared=True)
    if not trained:
        raise RuntimeError(f"all {len(recipes)} members failed: their messages stand above")
    kept = [one.checkpoint for one in trained]
    for one in trained:
        print(f"checkpoint of {one.name}: {one.checkpoint}", flush=True)
    together = save_ensemble(kept, storage.join(out, "checkpoint"))
    print(f"checkpoint of {len(kept)} members together: {together}", flush=True)
    failed = sorted(set(recipes) - {one.name for one in trained})
    return {"checkpoint": together, "members": kept, "failed": failed, "data": data}


def save_ensemble(members: list[str], target: str) -> str:
    """One checkpoint of several of family detect, at the URI `target`.

    Raises:
        UserError: they find other findings, or see other images.
    """
    loaded = [checkpoint.load(uri) for uri in members]
    first, recipes = loaded[0], [one.recipe for one in loaded]
    for one, recipe in zip(loaded, recipes, strict=True):
        alike = recipe.enhancement == first.recipe.enhancement and recipe.lung_crop == first.recipe.lung_crop
        if one.findings != first.findings or not alike:
            raise UserError(f"{one.uri} has other findings than {first.uri}, or sees other images: train them alike")
    recipe = first.recipe.replace(
        members=tuple(json.dumps(one.to_dict()) for one in recipes), size=max(one.size for one in recipes)
    )
    network = recipe.network(first.findings)
    assert isinstance(network, YoloEnsemble)
    for own, one in zip(network.members, loaded, strict=True):
        own.load_state_dict(one.network.state_dict())
    metrics = {f"member-{i}/{k}": v for i, one in enumerate(loaded) for k, v in one.about["metrics"].items()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(
            Path(folder), recipe, recipe.task(network), network.state_dict(), findings=first.findings, metrics=metrics
        )
        storage.upload_folder(Path(folder), target)
    return target


if __name__ == "__main__":
    run_job(main, Options)
