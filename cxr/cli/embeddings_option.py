"""The option `--embeddings` of `cxr train classify` and `cxr tune classify`; without torch, for a quick `--help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import tyro

from cxr.cli.early_options import early_values
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EmbeddingsOption:
    """The option of commands that can train a head on stored embeddings."""

    embeddings: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Train only the head, on the embeddings in this folder: the --out of `cxr score --save-embeddings`. This
    takes seconds and needs no cluster. The default archive is the one that was scored. Options for images and for the
    cluster have no effect. If the folder has embeddings of several checkpoints, or the option is repeated, the head
    classifies their concatenation (feature-level fusion)."""

    def from_embeddings(self, arguments: Sequence[str]) -> Self | None:
        """These options with the defaults of a head on the network that made the embeddings; None without
        `--embeddings`.

        Raises:
            UserError: there are no embeddings, or `--preset` or `--recipe` is given, too.
        """
        embeddings, presets, recipes = early_values(arguments, "--embeddings", "--preset", "--recipe")
        if not embeddings:
            return None
        if presets or recipes:
            raise UserError(
                "expected --embeddings without --preset and --recipe, got several: omit the others, because the "
                "settings are those of the network that made the embeddings"
            )
        from cxr.cli.head_jobs import head_recipe

        return replace(self, recipe=head_recipe(embeddings))  # pyright: ignore[reportCallIssue]
