"""Search the aligner's loss weights, depths, parameterization, target strategy and learning rate.

python jobs/tune_align.py  # on a small phantom archive

ray job submit --working-dir . -- python jobs/tune_align.py --archive s3://xrays/nih --out s3://xrays/tune --trials 20
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.align import AlignRecipe
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions, SearchOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job; the recipe's are where the search starts from."""

    out: str = "runs/tune_align"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    recipe: AlignRecipe = field(default_factory=lambda: AlignRecipe(size=96, epochs=12))
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.training_jobs import tune_job  # Ray takes seconds to import

    return tune_job(options.recipe, options.data, options.search, options.run, options.out)


if __name__ == "__main__":
    run_job(main, Options)
