"""The option `--embeddings` of `cxr train classify` and `cxr tune classify`; without torch, for a quick `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import tyro

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
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--embeddings", action="append")
        parser.add_argument("--preset")
        parser.add_argument("--recipe")
        parsed = parser.parse_known_args(list(arguments))[0]
        if not parsed.embeddings:
            return None
        if parsed.preset or parsed.recipe:
            raise UserError(
                "expected --embeddings without --preset and --recipe, got several: omit the others, because the "
                "settings are those of the network that made the embeddings"
            )
        from cxr.cli.head_jobs import head_recipe

        return replace(self, recipe=head_recipe(parsed.embeddings))  # pyright: ignore[reportCallIssue]
