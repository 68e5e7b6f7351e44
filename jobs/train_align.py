"""Train an aligner: an unsupervised spatial transformer that brings chest X-rays into one frame.

python jobs/train_align.py  # on a small phantom archive

ray job submit --working-dir . -- python jobs/train_align.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.align import AlignRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_align"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)
    recipe: AlignRecipe = field(default_factory=AlignRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    return train_job(options.recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
