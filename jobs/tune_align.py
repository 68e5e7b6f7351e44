"""Search the aligner's loss weights, depths, parameterization, target strategy and learning rate.

python jobs/tune_align.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_align.py --archive s3://xrays/nih --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import TuneOptions
from cxr.families.align import AlignRecipe
from cxr.families.presets import preset
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_align"
    """Folder or URI of the results."""
    recipe: AlignRecipe = field(default_factory=lambda: preset(AlignRecipe, "fast"))


if __name__ == "__main__":
    run_job(tune, Options)
