"""Train an aligner: an unsupervised spatial transformer that brings chest X-rays into one common frame.

python jobs/train_align.py  # on a small phantom archive

ray job submit --working-dir . -- python jobs/train_align.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import TrainOptions
from cxr.families.align import AlignRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_align"
    """Folder or URI of the results."""
    recipe: AlignRecipe = field(default_factory=AlignRecipe)


if __name__ == "__main__":
    run_job(train, Options)
