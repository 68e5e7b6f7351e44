"""Compare U-Nets and fully convolutional networks that segment lungs: Dice, HD95, speed, size, receptive field.

cxr study lungs --networks small_unet unet-resnet18 fcn8s-resnet18  # three of them, on a phantom archive

cxr study lungs --archive s3://xrays/montgomery --archive s3://xrays/shenzhen --out s3://xrays/study --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import SegmentationNetworks
from cxr.families.lungs import LungsRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(SegmentationNetworks):
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_lungs"
    """Folder or URI of the results: table.md, networks.csv, dice.png, and a folder for each network."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=300, stored_size=128))
    recipe: LungsRecipe = field(
        default_factory=lambda: LungsRecipe(
            size=128, warmup_size=0, warmup_epochs=0, epochs=12, fully_connected=False
        )
    )
    """Settings of all networks, except those in their names: architecture, backbone, attention."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_segmentation import run_study  # Ray takes seconds to import

    return run_study(options)
