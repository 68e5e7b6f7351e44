"""Training detectors: one network, or the members of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr.cli.commands import train
from cxr.cli.options import TrainOptions
from cxr.models.yolo import YoloSize


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Options of every training, and those of an ensemble."""

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


def main(options: Options) -> dict[str, Any]:
    if options.members == 1:
        return train.main(options)

    from cxr.cli.detect_ensemble import member_recipes, train_ensemble  # Ray takes seconds to import

    recipes = member_recipes(options.recipe, options.members, options.architectures, options.sizes)
    return train_ensemble(recipes, options.data, options.run, options.out, test_images=options.test_images)
