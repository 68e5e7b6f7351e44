"""Train a classifier that also locates findings, from image-level labels alone.

python jobs/train_localize.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/train_localize.py --archive s3://xrays/nih --out s3://xrays/localize \\
    --preset published
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.families.localize import LocalizeRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_localize"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: LocalizeRecipe = field(default_factory=LocalizeRecipe)


if __name__ == "__main__":
    run_job(train, Options)
