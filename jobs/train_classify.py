"""Train a multi-label classifier on a backbone of torchvision or timm.

python jobs/train_classify.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/train_classify.py --archive s3://xrays/nih --out s3://xrays/classify \\
    --preset densenet121-chexnet
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.families.classify import ClassifyRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_classify"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: ClassifyRecipe = field(default_factory=ClassifyRecipe)


if __name__ == "__main__":
    run_job(train, Options)
