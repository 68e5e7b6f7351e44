"""Train a network that finds pneumothorax, as SIIM-ACR (2019) marks it.

python jobs/train_pneumothorax.py  # on a phantom archive

python jobs/train_pneumothorax.py --archive /data/siim --shard-size 512 --out runs/pneumothorax
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.job import run_job
from cxr.recipes.pneumothorax import PneumothoraxRecipe
from cxr.train import RunOptions
from cxr.workflow import ArchiveOptions, train_job


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_pneumothorax"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)
    recipe: PneumothoraxRecipe = field(default_factory=PneumothoraxRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    return train_job(options.recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
