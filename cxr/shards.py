"""What `archive.json` says of shards. Apart from their reader, so that an ingest need not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.errors import UserError
from cxr.schema import PixelFormat

ARCHIVE_FILE, REJECTS_FILE = "archive.json", "rejects.parquet"
KIND, VERSION = "cxr-shards", 1


@dataclass(frozen=True)
class ShardFile:
    """One shard file: its URI and how many rows it holds."""

    uri: str
    rows: int


@dataclass(frozen=True)
class ShardInfo:
    """The parts of finished shards, and what is in them."""

    uri: str
    source: str
    findings: tuple[str, ...]
    pixels: PixelFormat
    row_group_rows: int
    parts: dict[str, tuple[ShardFile, ...]]  # by split
    rejects: int
    latents: Mapping[str, Any] | None = None  # of a latent archive: the encoder, see cxr.latents

    def rows(self, split: str) -> int:
        return sum(part.rows for part in self.parts.get(split, ()))


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading: one row group of one part."""

    uri: str
    index: int
    rows: int


def is_shards(uri: str) -> bool:
    return storage.exists(storage.join(uri, ARCHIVE_FILE))


def read_info(uri: str, *, latents: bool = False) -> ShardInfo:
    """Read `archive.json`.

    Args:
        latents: whether the pixels may be latents, too.

    Raises:
        UserError: there is none, which also means an ingest that has not finished; or latents, unasked for.
    """
    if not is_shards(uri):
        raise UserError(
            f"{uri} holds no {ARCHIVE_FILE}: not shards, or an ingest that did not finish. "
            f"Run jobs/ingest_archive.py with --out {uri}; it goes on from where it stopped"
        )
    about = storage.read_json(storage.join(uri, ARCHIVE_FILE))
    if about.get("latents") and not latents:
        raise UserError(
            f"{uri} holds latents, not X-rays: jobs/score_archive.py alone can use them. Give the archive they were "
            f"made of, {about['archive']}"
        )
    parts = {
        split: tuple(ShardFile(storage.join(uri, part["path"]), part["rows"]) for part in listed)
        for split, listed in about["parts"].items()
    }
    return ShardInfo(
        uri=uri,
        source=about["source"],
        findings=tuple(about["findings"]),
        pixels=PixelFormat(**about["pixels"]),
        row_group_rows=about["row_group_rows"],
        parts=parts,
        rejects=about["rejects"],
        latents=about.get("latents"),
    )


def row_groups(info: ShardInfo, split: str) -> list[RowGroup]:
    """All row groups of a split, in file order, without opening a file."""
    step = info.row_group_rows
    return [
        RowGroup(part.uri, i, min(step, part.rows - i * step))
        for part in info.parts.get(split, ())
        for i in range(-(-part.rows // step))
    ]
