"""Train an AE-CNN: a codec that compresses chest X-rays, and a classifier of the compressed images.

python jobs/train_aecnn.py  # on a phantom archive

python jobs/train_aecnn.py --archive /data/nih --preset published --out runs/published

ray job submit --working-dir . -- python jobs/train_aecnn.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.families.aecnn import AecnnRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_aecnn"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: AecnnRecipe = field(default_factory=AecnnRecipe)


if __name__ == "__main__":
    run_job(train, Options)
