"""Metadata (`archive.json`) of one or several sets of shards. Does not import torch; the reader is `shard_loader`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import UserError
from cxr.imaging.enhance import Enhancement
from cxr.schema import PixelFormat

ARCHIVE_FILE, REJECTS_FILE, INDEX_FILE = "archive.json", "rejects.parquet", "index.parquet"
KIND, VERSION = "cxr-shards", 1
MEMBERS, ARCHIVES = "members", "archives"  # keys of an archive.json that combines several sets of shards
MUST_AGREE = ("pixels", "row_group_rows", "crop", "enhancement")  # between combined sets of shards


@dataclass(frozen=True)
class ShardFile:
    """A shard file: its URI, its number of rows, and the findings of its labels."""

    uri: str
    rows: int
    findings: tuple[str, ...]


@dataclass(frozen=True)
class IndexFile:
    """The index of a set of shards (see `cxr.data.shard_index`): the shards' URI, and the findings of its labels."""

    shards: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class ShardInfo:
    """The files of completed shards, and a description of their contents."""

    uri: str
    source: str
    findings: tuple[str, ...]
    pixels: PixelFormat
    row_group_rows: int
    parts: dict[str, tuple[ShardFile, ...]]  # by split
    indexes: tuple[IndexFile, ...]  # one for each set of shards, in the order of their files
    rejects: int
    most_boxes: int = schema.MOST_BOXES  # maximum number of boxes per image
    latents: Mapping[str, Any] | None = None  # encoder of a latent archive, see cxr.inference.latents
    crop: Mapping[str, Any] | None = None  # how images were cropped or aligned, see cxr.families.image_crop
    enhancement: Enhancement = field(default_factory=Enhancement)  # applied before the pixels were stored
    selections: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)  # see `data.sampling`

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """The files of all splits, in a fixed order."""
        return tuple(file for files in self.parts.values() for file in files)

    def rows(self, split: str) -> int:
        return sum(part.rows for part in self.parts.get(split, ()))


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading: a row group of a file."""

    uri: str
    index: int
    rows: int
    findings: tuple[str, ...]


def is_shards(uri: str) -> bool:
    return storage.exists(storage.join(uri, ARCHIVE_FILE))


def read_info(uri: str, *, latents: bool = False) -> ShardInfo:
    """Read `archive.json`; if it combines several sets of shards, describe their union.

    Args:
        latents: whether latents are accepted instead of X-rays.

    Raises:
        UserError: there are no complete shards, there are latents but `latents` is false, or combined shards differ.
    """
    if not is_shards(uri):
        raise UserError(
            f"expected shards in {uri}, got no {ARCHIVE_FILE}: if ingest did not finish, resume it with "
            f"cxr ingest --out {uri}"
        )
    about = storage.read_json(storage.join(uri, ARCHIVE_FILE))
    if MEMBERS in about:
        return _combine(uri, [read_info(member) for member in about[MEMBERS]])
    if about.get("latents") and not latents:
        raise UserError(
            f"expected X-rays in {uri}, got latents, which only cxr score can use: use the archive from "
            f"which they were made, {about['archive']}"
        )
    findings = tuple(about["findings"])
    parts = {
        split: tuple(ShardFile(file_uri(uri, part["path"]), part["rows"], findings) for part in listed)
        for split, listed in about["parts"].items()
    }
    return ShardInfo(
        uri=uri,
        source=about["source"],
        findings=findings,
        pixels=PixelFormat(**about["pixels"]),
        row_group_rows=about["row_group_rows"],
        parts=parts,
        indexes=(IndexFile(uri, findings),),
        rejects=about["rejects"],
        most_boxes=about.get("most_boxes", schema.MOST_BOXES),
        latents=about.get("latents"),
        crop=about.get("crop"),
        enhancement=Enhancement(**about.get("enhancement", {})),
    )


def file_uri(uri: str, path: str) -> str:
    """The URI of a file of the shards at `uri`, given by its path in their metadata.

    Raises:
        UserError: the path leads out of the shards, which may be from others.
    """
    resolved = storage.resolve(path, uri)
    if not storage.is_inside(resolved, uri):
        raise UserError(f"expected paths of files below {uri}, got {path!r}: do not use these shards, ingest again")
    return resolved


def join_shards(uri: str, members: Sequence[str], archives: Sequence[str]) -> ShardInfo:
    """Combine several sets of shards at `uri` by writing an `archive.json` and their rejects; no shards are copied.

    Args:
        archives: archives from which the members were made, returned by `joined_archives`.

    Raises:
        UserError: the members differ in pixels or processing.
    """
    infos = [read_info(member) for member in members]
    info = _combine(uri, infos)
    rejects = [storage.read_parquet(storage.join(member.uri, REJECTS_FILE)) for member in infos if member.rejects]
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([schema.REJECTS.empty_table(), *rejects]), sink)
    storage.write_bytes(storage.join(uri, REJECTS_FILE), sink.getvalue())
    about = {"kind": KIND, "version": VERSION, MEMBERS: list(members), ARCHIVES: list(archives)}
    storage.write_json(storage.join(uri, ARCHIVE_FILE), about)
    return info


def joined_archives(uri: str) -> tuple[str, ...]:
    """The `archives` that `join_shards` recorded at `uri`; empty for other shards."""
    return tuple(storage.read_json(storage.join(uri, ARCHIVE_FILE)).get(ARCHIVES, ())) if is_shards(uri) else ()


def made_of(uri: str) -> tuple[str, ...]:
    """The raw archives from which shards or latents were made; the archive itself if it is raw."""
    if not is_shards(uri):
        return (uri,) if uri else ()
    about = storage.read_json(storage.join(uri, ARCHIVE_FILE))
    return tuple(raw for member in about.get(MEMBERS) or (about["archive"],) for raw in made_of(member))


def check_alike(kinds: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError unless all shards, given by URI, have the same properties, such as their pixel format."""
    (first, expected), *rest = kinds.items()
    for uri, kind in rest:
        for name, value in kind.items():
            if value != expected[name]:
                raise UserError(
                    f"expected the same {name} in combined archives, got {expected[name] or 'none'} in {first} and "
                    f"{value or 'none'} in {uri}: ingest them with the same settings, or train on one"
                )


def _combine(uri: str, members: Sequence[ShardInfo]) -> ShardInfo:
    first = members[0]
    check_alike({info.uri: {name: getattr(info, name) for name in MUST_AGREE} for info in members})
    return ShardInfo(
        uri=uri,
        source=" + ".join(dict.fromkeys(info.source for info in members)),
        findings=tuple(dict.fromkeys(finding for info in members for finding in info.findings)),
        pixels=first.pixels,
        row_group_rows=first.row_group_rows,
        indexes=tuple(index for info in members for index in info.indexes),
        parts={split: sum((info.parts.get(split, ()) for info in members), ()) for split in schema.SPLITS},
        rejects=sum(info.rejects for info in members),
        most_boxes=max(info.most_boxes for info in members),
        crop=first.crop,
        enhancement=first.enhancement,
    )


def read_rows(
    part: ShardFile | RowGroup,
    columns: Sequence[str],
    findings: Sequence[str],
    reader: storage.RowGroupReader | None = None,
) -> pa.Table:
    """These columns of a file or of a row group, with labels of `findings`.

    Combined shards may have different findings: those that a file does not have are unknown for its images.

    Args:
        reader: keeps the footers for the next row groups.
    """
    if isinstance(part, RowGroup):
        rows = (reader or storage.RowGroupReader()).read(part.uri, part.index, columns)
    else:
        rows = storage.read_parquet(part.uri, columns=columns)
    if schema.LABELS not in rows.column_names or part.findings == tuple(findings):
        return rows
    known_N = rows[schema.LABELS].is_valid().to_numpy()
    labels_NF = aligned_labels(rows[schema.LABELS], part.findings, findings)
    ends = pa.array(np.arange(len(known_N) + 1, dtype=np.int32) * len(findings))
    aligned = pa.ListArray.from_arrays(ends, pa.array(labels_NF.reshape(-1)), mask=pa.array(~known_N))
    index = rows.schema.get_field_index(schema.LABELS)
    return rows.set_column(index, rows.schema.field(index), aligned)


def aligned_labels(lists: pa.ChunkedArray, own: Sequence[str], findings: Sequence[str]) -> np.ndarray:
    """Labels of `own` findings as labels of `findings`, int8 (N, F); unknown where there are none."""
    known_N = lists.is_valid().to_numpy()
    own_NF = pc.list_flatten(lists).to_numpy().reshape(known_N.sum(), len(own))
    common = [finding for finding in own if finding in findings]
    labels_NF = np.full((len(known_N), len(findings)), schema.UNKNOWN, np.int8)
    at = [list(findings).index(finding) for finding in common]
    labels_NF[np.ix_(known_N, at)] = own_NF[:, [list(own).index(finding) for finding in common]]
    return labels_NF


def row_groups(info: ShardInfo, split: str) -> list[RowGroup]:
    """All row groups of a split, in file order, without opening a file."""
    step = info.row_group_rows
    return [
        RowGroup(part.uri, i, min(step, part.rows - i * step), part.findings)
        for part in info.parts.get(split, ())
        for i in range(-(-part.rows // step))
    ]
