"""Train a classifier of images, or only its head on stored embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cxr.cli.embeddings_option import EmbeddingsOption
from cxr.cli.options import TrainOptions
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(EmbeddingsOption, TrainOptions):
    """Settings of the job."""

    def starting_point(self, arguments: Sequence[str]) -> Self:
        return self.from_embeddings(arguments) or super().starting_point(arguments)


def main(options: Options) -> dict[str, Any]:
    """Train the recipe; returns the result.json."""
    if options.embeddings:
        if options.members > 1:
            raise UserError(f"--members: expected 1 with --embeddings, got {options.members}: omit one of them")
        from cxr.cli.head_jobs import train_head_job

        return train_head_job(options.recipe, options.embeddings, options.data, options.out)
    from cxr.cli.commands import train

    return train.main(options)
