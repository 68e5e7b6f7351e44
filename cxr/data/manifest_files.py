"""A manifest stored in pieces: Parquet files with a row group for each piece of work.

Workers are sent the places of their row groups instead of rows, so that neither the driver nor Ray's object store has
to hold the rows of all of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import storage
from cxr.data.ledger import SUFFIX, Part
from cxr.data.prefetch import read_ahead
from cxr.data.shards import RowGroup

_PIECES_PER_FILE = 64  # a file's footer, which each reader of a piece reads first, describes so many
_THREADS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class StoredPart:
    """The name of a part, and where its rows are stored."""

    name: str
    group: RowGroup

    @property
    def path(self) -> str:
        return self.name + SUFFIX

    def read(self) -> Part:
        return Part(self.name, read_piece(self.group))


def write_parts(folder: str, parts: Iterable[Part]) -> list[StoredPart]:
    """Store the rows of each part, as `write_pieces` does."""
    names: list[str] = []

    def rows() -> Iterator[pa.Table]:
        for part in parts:
            names.append(part.name)
            yield part.rows

    groups = write_pieces(folder, rows())
    return [StoredPart(name, group) for name, group in zip(names, groups, strict=True)]


def write_pieces(folder: str, pieces: Iterable[pa.Table]) -> list[RowGroup]:
    """Store each piece as a row group of a file in `folder`; returns where they are, in the same order.

    Some hundred pieces are in memory at a time.
    """

    def write(numbered: tuple[int, Sequence[pa.Table]]) -> list[RowGroup]:
        number, tables = numbered
        uri = storage.join(folder, f"{number:05d}{SUFFIX}")
        storage.write_bytes(uri, file_of(tables, tables[0].schema))
        return [RowGroup(uri, index, table.num_rows, ()) for index, table in enumerate(tables)]

    return [group for groups in read_ahead(write, enumerate(by_file(pieces)), _THREADS) for group in groups]


def by_file(pieces: Iterable[T]) -> Iterator[list[T]]:
    """The pieces that are stored together, file by file."""
    remaining = iter(pieces)
    return iter(lambda: list(islice(remaining, _PIECES_PER_FILE)), [])


def file_of(pieces: Iterable[pa.Table], fields: pa.Schema) -> bytes:
    """The content of a Parquet file with each piece as a row group."""
    sink = io.BytesIO()
    # Dictionaries and statistics would be most of a small row group.
    with pq.ParquetWriter(sink, fields, compression="zstd", use_dictionary=False, write_statistics=False) as file:
        for piece in pieces:
            file.write_table(piece, row_group_size=max(1, piece.num_rows))
    return sink.getvalue()


def read_piece(group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a piece, with the schema and metadata with which it was written; all columns, or some."""
    return storage.read_parquet(group.uri, row_groups=[group.index], columns=columns)
