"""Compare single backbones, the mean of their probabilities, and one head on the features of all of them.

cxr study features  # on phantoms

cxr study features --archive s3://xrays/nih --out s3://xrays/study --backbones resnet50 densenet121 \\
    --backbone-pretrained IMAGENET1K_V1 --size 224 --stored-size 256
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.classify import ClassifyRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_features"
    """Folder or URI of the results: table.md, results.csv, auroc.png, and a folder for each backbone and seed."""
    backbones: tuple[str, ...] = ("small", "resnet18")
    """Backbones to train and to fuse, see --backbone. All have the size and the input of the recipe."""
    seeds: int = 3
    """Number of networks per backbone, each with its own seed."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400, stored_size=64))
    recipe: ClassifyRecipe = field(default_factory=lambda: ClassifyRecipe(size=64, epochs=10))
    """Settings of all networks, except backbone."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_features import run_study  # Ray takes seconds to import

    return run_study(options)
