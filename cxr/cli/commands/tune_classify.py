"""Search the settings of a classifier of images, or only those of its head on stored embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cxr.cli.embeddings_option import EmbeddingsOption
from cxr.cli.options import TuneOptions


@dataclass(frozen=True, kw_only=True)
class Options(EmbeddingsOption, TuneOptions):
    """Settings of the job."""

    def starting_point(self, arguments: Sequence[str]) -> Self:
        return self.from_embeddings(arguments) or super().starting_point(arguments)


def main(options: Options) -> dict[str, Any]:
    """Search the settings of the recipe; returns the result.json."""
    if options.embeddings:
        from cxr.cli.head_jobs import tune_head_job

        return tune_head_job(options.recipe, options.embeddings, options.data, options.search, options.out)
    from cxr.cli.commands import tune

    return tune.main(options)
