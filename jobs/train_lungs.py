"""Train a network that finds the lung fields; its checkpoint crops images for other families (--lung-crop).

python jobs/train_lungs.py  # on a phantom archive

python jobs/train_lungs.py --archive /data/montgomery --archive /data/shenzhen --out runs/lungs
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.lungs import LungsRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_lungs"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)
    recipe: LungsRecipe = field(default_factory=LungsRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    return train_job(options.recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
