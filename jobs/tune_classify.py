"""Search the learning rate, class weights, head and backbone size of a multi-label classifier.

python jobs/tune_classify.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_classify.py --archive s3://xrays/nih \\
    --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.families.classify import ClassifyRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_classify"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: ClassifyRecipe = field(default_factory=ClassifyRecipe)


if __name__ == "__main__":
    run_job(tune, Options)
