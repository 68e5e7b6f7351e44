"""What `archive.json` says of shards, or of several that are used as one. Apart from their reader, without torch."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import UserError
from cxr.imaging.enhance import Enhancement
from cxr.schema import PixelFormat

ARCHIVE_FILE, REJECTS_FILE = "archive.json", "rejects.parquet"
KIND, VERSION = "cxr-shards", 1
MEMBERS, ARCHIVES = "members", "archives"  # of an archive.json that makes several shards one
ALIKE = ("pixels", "row_group_rows", "lung_crop", "enhancement")  # in what these must agree
_THREADS = 16


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
    most_boxes: int = schema.MOST_BOXES  # that an image has
    latents: Mapping[str, Any] | None = None  # of a latent archive: the encoder, see cxr.inference.latents
    lung_crop: Mapping[str, Any] | None = None  # of crops to the lungs: how, see cxr.families.lung_crop
    enhancement: Enhancement = field(default_factory=Enhancement)  # what was done to them before they were stored

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
    """Read `archive.json`; where it names other shards, what these hold together.

    Args:
        latents: whether the pixels may be latents, too.

    Raises:
        UserError: there is none, which also means an ingest that has not finished; or latents, unasked for; or
            shards named together that differ.
    """
    if not is_shards(uri):
        raise UserError(
            f"{uri} holds no {ARCHIVE_FILE}: not shards, or an ingest that did not finish. "
            f"Run jobs/ingest_archive.py with --out {uri}; it goes on from where it stopped"
        )
    about = storage.read_json(storage.join(uri, ARCHIVE_FILE))
    if MEMBERS in about:
        return _together(uri, [read_info(member) for member in about[MEMBERS]])
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
        most_boxes=about.get("most_boxes", schema.MOST_BOXES),
        latents=about.get("latents"),
        lung_crop=about.get("lung_crop"),
        enhancement=Enhancement(**about.get("enhancement", {})),
    )


def join_shards(uri: str, members: Sequence[str], archives: Sequence[str]) -> ShardInfo:
    """Make `uri` stand for all of `members`, which stay where they are: an `archive.json` and their rejects.

    Args:
        archives: what the members were made of, to tell one list from another: see `joined_archives`.

    Raises:
        UserError: their pixels differ.
    """
    told = [read_info(member) for member in members]
    info = _together(uri, told)
    rejects = [storage.read_parquet(storage.join(one.uri, REJECTS_FILE)) for one in told if one.rejects]
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([schema.REJECTS.empty_table(), *rejects]), sink)
    storage.write_bytes(storage.join(uri, REJECTS_FILE), sink.getvalue())
    about = {"kind": KIND, "version": VERSION, MEMBERS: list(members), ARCHIVES: list(archives)}
    storage.write_json(storage.join(uri, ARCHIVE_FILE), about)
    return info


def joined_archives(uri: str) -> tuple[str, ...]:
    """The archives that `join_shards` was given at `uri`; none where it was not called."""
    return tuple(storage.read_json(storage.join(uri, ARCHIVE_FILE)).get(ARCHIVES, ())) if is_shards(uri) else ()


def made_of(uri: str) -> tuple[str, ...]:
    """The raw archives of which shards were made, or latents of these; the archive itself where it is a raw one."""
    if not is_shards(uri):
        return (uri,) if uri else ()
    about = storage.read_json(storage.join(uri, ARCHIVE_FILE))
    return tuple(raw for one in about.get(MEMBERS) or (about["archive"],) for raw in made_of(one))


def check_ids(info: ShardInfo) -> None:
    """Raise UserError where several shards used as one name two images alike: scores are known by their image's id.

    To train on them does no harm.
    """
    if not joined_archives(info.uri):
        return
    files = [file.uri for files in info.parts.values() for file in files]
    files += [storage.join(info.uri, REJECTS_FILE)] if info.rejects else []
    check_unique(image_ids(files), f"the archives that {info.uri} stands for")


def image_ids(files: Sequence[str]) -> Iterator[str]:
    """The image ids in Parquet files of rows or rejects, by their URIs."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for table in pool.map(partial(storage.read_parquet, columns=[schema.IMAGE_ID]), files):
            yield from table[schema.IMAGE_ID].to_pylist()


def check_unique(ids: Iterable[str], archives: str) -> None:
    """Raise UserError where an image id occurs twice in what is named `archives`."""
    counts = Counter(ids)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(
            f"{archives} have {len(twice):,} image ids in common, {twice[0]!r} for one: score and judge each archive "
            f"alone, or rename the images of one"
        )


def check_alike(kinds: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError unless what is told of all shards, by URI, is the same: their pixels, say."""
    (first, wanted), *others = kinds.items()
    for uri, kind in others:
        for name, value in kind.items():
            if value != wanted[name]:
                raise UserError(
                    f"{first} and {uri} cannot be used together: their {name} differ, {wanted[name] or 'none'} and "
                    f"{value or 'none'}. Give archives that agree in it, or train on one"
                )


def _together(uri: str, members: Sequence[ShardInfo]) -> ShardInfo:
    first = members[0]
    check_alike({info.uri: {name: getattr(info, name) for name in ALIKE} for info in members})
    return ShardInfo(
        uri=uri,
        source=" + ".join(dict.fromkeys(info.source for info in members)),
        findings=first.findings if len({info.findings for info in members}) == 1 else (),
        pixels=first.pixels,
        row_group_rows=first.row_group_rows,
        parts={split: sum((info.parts.get(split, ()) for info in members), ()) for split in schema.SPLITS},
        rejects=sum(info.rejects for info in members),
        most_boxes=max(info.most_boxes for info in members),
        lung_crop=first.lung_crop,
        enhancement=first.enhancement,
    )


def row_groups(info: ShardInfo, split: str) -> list[RowGroup]:
    """All row groups of a split, in file order, without opening a file."""
    step = info.row_group_rows
    return [
        RowGroup(part.uri, i, min(step, part.rows - i * step))
        for part in info.parts.get(split, ())
        for i in range(-(-part.rows // step))
    ]
