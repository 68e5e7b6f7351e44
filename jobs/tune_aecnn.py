"""Search the AE-CNN's loss weights, codec, compression, classifier and learning rate.

python jobs/tune_aecnn.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/tune_aecnn.py --archive s3://xrays/nih --out s3://xrays/tune \\
    --objectives mean_auroc psnr --trials 40
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.aecnn import AecnnRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions, SearchOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job; the recipe's are where the search starts from."""

    out: str = "runs/tune_aecnn"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200))
    search: SearchOptions = field(default_factory=SearchOptions)
    recipe: AecnnRecipe = field(
        default_factory=lambda: AecnnRecipe(
            size=128, batch_size=32, classifier_epochs=3, autoencoder_epochs=1, epochs=6
        )
    )
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import tune_job  # Ray takes seconds to import

    return tune_job(options.recipe, options.data, options.search, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
