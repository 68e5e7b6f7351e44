"""Compare networks that locate findings from labels alone: maps of all stages or of the last one, several seeds.

cxr benchmark localization  # multiscale and last, on phantoms with small and large findings

cxr benchmark localization --archive s3://xrays/nih --out s3://xrays/study \\
    --backbone densenet121 --size 512 --stored-size 512 --pooling mean --backbone-pretrained s3://models/densenet121.pth
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.localize import LocalizeRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_localization"
    """Folder or URI of the results: table.md, networks.csv, accuracy.png, and a folder for each network."""
    variants: tuple[str, ...] = ("multiscale", "last")
    """Variants to compare: multiscale; fused (multiscale with fusion=maps); uniform; last; multiscale or last with
    -mean, -max or -lse for another pooling."""
    seeds: int = 5
    """Number of networks per variant, each with its own seed. With few, one that does not learn a finding
    decides the mean. A larger number with the same --out trains only the networks that are missing."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200, stored_size=128))
    recipe: LocalizeRecipe = field(default_factory=lambda: LocalizeRecipe(size=128))
    """Settings of all networks, except those that a variant sets: cam_stages, relevance, fusion, pooling."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_localization import run_study  # Ray takes seconds to import

    return run_study(
        options.recipe,
        options.data,
        options.run,
        options.out,
        variants=options.variants,
        seeds=options.seeds,
    )
