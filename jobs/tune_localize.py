"""Search the learning rate and pooling of a classifier that locates findings.

python jobs/tune_localize.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_localize.py --archive s3://xrays/nih \\
    --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.families.localize import LocalizeRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_localize"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: LocalizeRecipe = field(default_factory=LocalizeRecipe)


if __name__ == "__main__":
    run_job(tune, Options)
