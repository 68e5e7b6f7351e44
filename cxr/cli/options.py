"""Options that jobs share. This module imports neither torch nor Ray, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from cxr import storage
from cxr.sources import Labeling


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions:
    """Which X-rays to use, and how they are read."""

    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive or shards: a folder, s3://bucket/prefix or gs://bucket/prefix; left out, a small phantom archive. Given
    several times, archives are used as one; where labels are learnt, their findings must be the same."""
    source: str = "auto"
    """Layout of each archive: auto, or the name of a source."""
    shard_size: int = 256
    """Height and width at which an archive is turned into shards, pixels."""
    stream: bool = False
    """Train straight from one archive, decoding in every epoch, instead of writing shards to OUT/shards first."""
    max_rejects: float = 0.05
    """Share of images that may be unreadable before the job fails."""
    phantoms: int = 160
    """Images of the phantom archive made when none is given."""
    labeling: Labeling = field(default_factory=Labeling)

    @property
    def uris(self) -> list[str]:
        """The archives' normalized URIs."""
        return [storage.normalize(archive) for archive in self.archive]
