"""Options of scoring, and what they exclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cxr import storage
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How an archive is scored."""

    source: str = "auto"
    """Layout of the archive: auto, or the name of a source."""
    workers: int | None = None
    """Copies of the network that score at once; unset for one a GPU, or half of the CPUs."""
    batch_size: int = 64
    """Images a forward pass."""
    save_images: bool = False
    """Also write the family's pictures, e.g. OUT/aligned/IMAGE_ID.png, which is a.png.png for the image a.png."""
    save_latents: bool = False
    """Also write OUT/latents, an archive of what the checkpoint's encoder keeps of the images; it can be scored."""
    max_rejects: float = 0.5
    """Share of images that may be unreadable before the job fails; all others are scored all the same."""


def check_archives(uris: Sequence[str], options: ScoreOptions) -> list[str]:
    """The archives' normalized URIs; raises UserError where several cannot be scored into one result."""
    archives = [storage.normalize(uri) for uri in uris]
    if len(set(archives)) < len(archives):
        raise UserError(f"--archive {' --archive '.join(archives)}: the same archive twice; give each archive once")
    if len(archives) > 1 and options.save_latents:
        raise UserError("--save-latents takes one archive, got several: score each into its own --out")
    return archives
