"""Training any family. Its defaults are in the entries of `COMMANDS`."""

from __future__ import annotations

from typing import Any

from cxr.cli.options import TrainOptions as Options

__all__ = ["Options", "main"]


def main(options: Options) -> dict[str, Any]:
    """Train the recipe; returns the result.json."""
    from cxr.cli.training_jobs import train_job  # imports Ray

    return train_job(options.recipe, options.data, options.run, options.out)
