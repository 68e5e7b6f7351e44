"""Train a network that finds findings and where they are, taught by labels alone.

python jobs/train_localize.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/train_localize.py --archive s3://xrays/nih --out s3://xrays/localize \\
    --data.shard-size 512 --recipe.size 512 --recipe.backbone densenet121 --recipe.classifier-weights IMAGENET1K_V1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.localize import LocalizeRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_localize"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: LocalizeRecipe = field(default_factory=LocalizeRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    return train_job(options.recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
