"""Train YOLOv5 to detect boxes around findings: one network, or an ensemble.

python jobs/train_detect.py  # on a phantom archive: the smallest network, for CPUs

python jobs/train_detect.py --archive s3://xrays/vinbigdata --preset ultralytics --out s3://xrays/detect --workers 8

python jobs/train_detect.py --archive s3://xrays/vinbigdata --preset ultralytics --stored-size 1024 --folds 5 \\
    --members 5 --architectures yolov5s yolov5m --sizes 640 1024 --out s3://xrays/ensemble

The default settings (preset demo) suit a few hundred images and a few thousand steps: AdamW, no mosaic. The preset
ultralytics is for long trainings on many images. As many members are trained at a time as the cluster has room for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.families.detect import DetectRecipe
from cxr.families.presets import preset
from cxr.models.yolo import YoloSize
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_detect"
    """Folder or URI of the results."""
    members: int = 1
    """Number of networks to train. Several networks become an ensemble: each has its own seed, and they cycle
    through folds, architectures and sizes. If a member fails, the job continues without it."""
    architectures: tuple[YoloSize, ...] = ()
    """Architectures that the members of an ensemble cycle through. Default: the recipe's."""
    sizes: tuple[int, ...] = ()
    """Input sizes in pixels that the members of an ensemble cycle through. Default: the recipe's."""
    test_images: int = 1000
    """Number of test images, spread evenly over the split, on which an ensemble and its members are compared. They
    are held in memory. 0: all."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400))
    recipe: DetectRecipe = field(default_factory=lambda: preset(DetectRecipe, "demo"))


def main(options: Options) -> dict[str, Any]:
    if options.members == 1:
        return train(options)

    from cxr.cli.detect_ensemble import member_recipes, train_ensemble  # Ray takes seconds to import

    recipes = member_recipes(options.recipe, options.members, options.architectures, options.sizes)
    return train_ensemble(recipes, options.data, options.run, options.out, test_images=options.test_images)


if __name__ == "__main__":
    run_job(main, Options)
