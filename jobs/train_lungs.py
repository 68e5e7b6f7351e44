"""Train a network that segments the lung fields; its checkpoint crops images for other families (--lung-crop).

python jobs/train_lungs.py  # on a phantom archive

python jobs/train_lungs.py --archive /data/montgomery --archive /data/shenzhen --out runs/lungs
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import TrainOptions
from cxr.families.lungs import LungsRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_lungs"
    """Folder or URI of the results."""
    recipe: LungsRecipe = field(default_factory=LungsRecipe)


if __name__ == "__main__":
    run_job(train, Options)
