"""Train a network of any family. Its defaults are in the entries of `COMMANDS`."""

from __future__ import annotations

from typing import Any

from cxr.cli.options import TrainOptions as Options

__all__ = ["Options", "main"]


def main(options: Options) -> dict[str, Any]:
    """Train the recipe, or the members of an ensemble; returns the result.json."""
    if options.members > 1:
        from cxr.cli.ensembles import member_changes, train_ensemble  # imports Ray

        changes = member_changes(options.recipe, options.members)
        return train_ensemble(options.recipe, changes, options.data, options.run, options.out)

    from cxr.cli.training_jobs import train_job  # imports Ray

    return train_job(options.recipe, options.data, options.run, options.out, resume=options.resume)
