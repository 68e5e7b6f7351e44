"""Train a detector: one network, or the members of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr.cli.commands import train
from cxr.cli.options import TrainOptions
from cxr.errors import UserError
from cxr.models.yolo import YoloSize


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Options of every training, and those of ensembles of different detectors."""

    architectures: tuple[YoloSize, ...] = ()
    """Architectures that the members of an ensemble cycle through. Default: the recipe's."""
    sizes: tuple[int, ...] = ()
    """Input sizes in pixels that the members of an ensemble cycle through. Default: the recipe's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members == 1 and self.architectures:
            raise UserError(
                "expected --members of 2 or more with --architectures, got 1: use --architecture for one network"
            )
        if self.members == 1 and self.sizes:
            raise UserError("expected --members of 2 or more with --sizes, got 1: use --size for one network")


def main(options: Options) -> dict[str, Any]:
    if options.members == 1:
        return train.main(options)

    from cxr.cli.ensembles import member_changes, train_ensemble  # imports Ray

    recipe = options.recipe
    architectures, sizes = options.architectures or (recipe.architecture,), options.sizes or (recipe.size,)
    changes = [
        {
            **change,
            "architecture": architectures[number % len(architectures)],
            "size": sizes[number % len(sizes)],
        }
        for number, change in enumerate(member_changes(recipe, options.members))
    ]
    return train_ensemble(recipe, changes, options.data, options.run, options.out)
