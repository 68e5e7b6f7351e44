"""Search the learning rate and loss weights of a pneumothorax segmentation network.

python jobs/tune_pneumothorax.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_pneumothorax.py --archive s3://xrays/siim \\
    --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cxr.cli.entry import tune
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.cli.phantoms import siim_phantoms
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.families.presets import preset
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TuneOptions):
    """Settings of the job; the search starts from those of the recipe."""

    out: str = "runs/tune_pneumothorax"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600))
    recipe: PneumothoraxRecipe = field(default_factory=lambda: preset(PneumothoraxRecipe, "demo"))


def main(options: Options) -> dict[str, Any]:
    return tune(replace(options, data=siim_phantoms(options.data, options.out)))


if __name__ == "__main__":
    run_job(main, Options)
