"""Compare U-Nets and fully convolutional networks that segment pneumothorax: Dice, speed, size, receptive field.

cxr benchmark pneumothorax --networks unet-resnet18 fcn8s-resnet18  # two of them, on a phantom archive

cxr benchmark pneumothorax --archive s3://xrays/siim \\
    --out s3://xrays/study --size 512 --stored-size 512 --epochs 20 --fully-connected --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_pneumothorax"
    """Folder or URI of the results: table.md, networks.csv, dice.png, and a folder for each network."""
    networks: tuple[str, ...] = ()
    """Networks to compare: small_unet, unet-BACKBONE, unet-BACKBONE-scse (resnet18, resnet34), fcn32s-BACKBONE,
    fcn16s-BACKBONE, fcn8s-BACKBONE (alexnet, vgg16, googlenet, resnet18, resnet34, resnet50). Default: all of
    them."""
    seeds: int = 1
    """Number of networks per kind, each with its own seed."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: PneumothoraxRecipe = field(
        default_factory=lambda: PneumothoraxRecipe(size=128, epochs=8, fully_connected=False)
    )
    """Settings of all networks, except those in their names: architecture, backbone, attention."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_pneumothorax import run_study  # Ray takes seconds to import

    return run_study(
        options.recipe,
        options.data,
        options.run,
        options.out,
        networks=options.networks,
        seeds=options.seeds,
    )
