"""Search the learning rate and loss weights of a lung segmentation network.

python jobs/tune_lungs.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_lungs.py --archive s3://xrays/montgomery \\
    --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import TuneOptions
from cxr.families.lungs import LungsRecipe
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_lungs"
    """Folder or URI of the results."""
    recipe: LungsRecipe = field(default_factory=LungsRecipe)


if __name__ == "__main__":
    run_job(tune, Options)
