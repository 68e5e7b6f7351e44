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

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.detect import DetectRecipe
from cxr.models.yolo import YoloSize
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


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
    from cxr.cli.detect_ensemble import member_recipes, train_ensemble  # Ray takes seconds to import
    from cxr.cli.training_jobs import train_job

    if options.members == 1:
        return train_job(options.recipe, options.data, options.run, options.out)
    recipes = member_recipes(options.recipe, options.members, options.architectures, options.sizes)
    return train_ensemble(recipes, options.data, options.run, options.out, test_images=options.test_images)


if __name__ == "__main__":
    run_job(main, Options)
