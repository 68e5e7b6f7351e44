"""Train a network that finds pneumothorax, as SIIM-ACR (2019) marks it.

python jobs/train_pneumothorax.py  # on a phantom archive, with a small network for CPUs

python jobs/train_pneumothorax.py --archive /data/siim --shard-size 512 --size 512 --architecture unet --lr 5e-4 \\
    --positives-from .8 --positives-to .4 --average 3 --out runs/pneumothorax  # much of what SIIM-ACR's winners did
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import siim_phantoms
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_pneumothorax"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600))
    recipe: PneumothoraxRecipe = field(
        default_factory=lambda: PneumothoraxRecipe(size=256, architecture="small_unet", lr=2e-3)
    )
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    data = siim_phantoms(options.data, options.out)
    return train_job(options.recipe, data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
