"""Train a network that locates findings by comparing aligned chest X-rays with those without findings.

python jobs/train_attend.py  # on a phantom archive, without alignment

python jobs/train_align.py --archive /data/nih --out runs/align
python jobs/train_attend.py --archive /data/nih --preset published --aligner runs/align/checkpoint --out runs/attend
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.families.attend import AttendRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_attend"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=800))
    recipe: AttendRecipe = field(default_factory=AttendRecipe)


if __name__ == "__main__":
    run_job(train, Options)
