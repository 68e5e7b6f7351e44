"""Compare an AE-CNN with the same classifier on resized and on uncompressed images: mean AUROC over several seeds.

cxr benchmark aecnn  # on a phantom archive

cxr benchmark aecnn --archive s3://xrays/nih --out s3://xrays/study --seeds 5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.aecnn import AecnnRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_aecnn"
    """Folder or URI of the results: table.md, auroc.png, and a folder for each recipe."""
    seeds: int = 3
    """Number of networks per recipe, each with its own seed."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: AecnnRecipe = field(default_factory=lambda: AecnnRecipe(size=128, compression=4))
    """Settings of the AE-CNN. The other recipes differ only in `compressor` and skip the autoencoder stage."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_aecnn import run_study  # Ray takes seconds to import

    return run_study(options.recipe, options.data, options.run, options.out, seeds=options.seeds)
