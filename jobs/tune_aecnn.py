"""Search the AE-CNN's loss weights, codec, compression, classifier and learning rate.

python jobs/tune_aecnn.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_aecnn.py --archive s3://xrays/nih \\
    --out s3://xrays/tune --trials 40 --objectives mean_auroc psnr_pooled
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr.cli.entry import tune
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.families.aecnn import AecnnRecipe
from cxr.families.presets import preset
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_aecnn"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    recipe: AecnnRecipe = field(default_factory=lambda: preset(AecnnRecipe, "fast"))


if __name__ == "__main__":
    run_job(tune, Options)
