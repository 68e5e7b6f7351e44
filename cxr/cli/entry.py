"""The bodies of `jobs/train_FAMILY.py` and `jobs/tune_FAMILY.py`. Ray is imported when they run, not for `--help`."""

from __future__ import annotations

from typing import Any

from cxr.cli.options import TrainOptions, TuneOptions


def train(options: TrainOptions) -> dict[str, Any]:
    """Train the recipe; returns the result.json."""
    from cxr.cli.training_jobs import train_job

    return train_job(options.recipe, options.data, options.run, options.out)


def tune(options: TuneOptions) -> dict[str, Any]:
    """Search the settings of the recipe; returns the result.json."""
    from cxr.cli.search_jobs import tune_job

    return tune_job(options.recipe, options.data, options.search, options.run, options.out)
