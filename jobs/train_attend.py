"""Train a network that finds where findings lie, by comparing aligned chest X-rays with those of people without any.

python jobs/train_attend.py  # on a phantom archive, without alignment

python jobs/train_align.py --archive /data/nih --out runs/align
python jobs/train_attend.py --archive /data/nih --aligner runs/align/checkpoint --shard-size 512 --size 512 \\
    --backbone resnet50 --backbone-stages 4 --backbone-weights IMAGENET1K_V1 --out runs/attend  # much as published
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.attend import AttendRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/train_attend"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=800))
    recipe: AttendRecipe = field(default_factory=AttendRecipe)
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import train_job  # Ray takes seconds to import

    return train_job(options.recipe, options.data, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
