"""Join trained networks of one family into an ensemble: one checkpoint that combines their predictions.

cxr ensemble --checkpoint runs/a/checkpoint --checkpoint runs/b/checkpoint --archive runs/a/shards

cxr train classify --archive s3://xrays/nih --out s3://xrays/ensemble --members 5  # trains the networks, too

Chooses the ensemble's thresholds on the archive's validation images, and compares it with its members on test images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tyro

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the command."""

    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or URI of the checkpoint of a member. Repeat the option for each of at least two members."""
    out: str = "runs/ensemble"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)


def main(options: Options) -> dict[str, Any]:
    uris = list(map(storage.normalize, options.checkpoint))
    if len(uris) < 2 or len(set(uris)) < len(uris):
        raise UserError(
            f"expected --checkpoint at least twice, with different checkpoints, got {', '.join(uris) or 'none'}"
        )
    if not options.data.archive:
        raise UserError(
            "expected --archive with validation images, on which thresholds of the ensemble are chosen: use the "
            "archive or the shards that the members were trained on"
        )
    if options.data.stream:
        raise UserError("an ensemble needs shards, on whose validation images thresholds are chosen: omit --stream")

    from cxr.cli.ensembles import join_checkpoints
    from cxr.cli.training_jobs import ensure_shards
    from cxr.families import checkpoint_files, recipe_from_dict
    from cxr.families.ensemble import check_members
    from cxr.runtime import cluster

    recipes = [recipe_from_dict(checkpoint_files.read_about(uri)["recipe"]) for uri in uris]
    check_members(recipes)
    out, archive = storage.normalize(options.out), options.data.with_headers(options.out)
    cluster.connect()
    data = ensure_shards(archive, out, max(recipes, key=lambda recipe: recipe.size))
    members = {f"member-{number}": uri for number, uri in enumerate(uris)}
    return join_checkpoints(members, data, out)
