"""Train an AE-CNN: a codec that compresses chest X-rays, and a classifier that sees only what it kept.

python jobs/train_aecnn.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/train_aecnn.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.aecnn import AecnnRecipe
from cxr.families.aecnn_published import as_published
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_aecnn"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    published: bool = False
    """Take the paper's settings where no other are given; they need images of 1024 px (--shard-size 1024)."""
    recipe: AecnnRecipe = field(default_factory=AecnnRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    recipe = as_published(options.recipe) if options.published else options.recipe
    return train_job(recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
