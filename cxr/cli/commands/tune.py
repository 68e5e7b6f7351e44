"""Search the settings of any family. Its defaults are in the entries of `COMMANDS`."""

from __future__ import annotations

from typing import Any

from cxr.cli.options import TuneOptions as Options

__all__ = ["Options", "main"]


def main(options: Options) -> dict[str, Any]:
    """Search the settings of the recipe; returns the result.json."""
    from cxr.cli.search_jobs import tune_job  # imports Ray

    return tune_job(options.recipe, options.data, options.search, options.run, options.out, resume=options.resume)
