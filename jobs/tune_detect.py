"""Search a detector's learning rate, loss weights and augmentation.

python jobs/tune_detect.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_detect.py --archive s3://xrays/vinbigdata \\
    --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.families.detect import DetectRecipe
from cxr.families.presets import preset
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_detect"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400))
    recipe: DetectRecipe = field(default_factory=lambda: preset(DetectRecipe, "demo"))


if __name__ == "__main__":
    run_job(tune, Options)
