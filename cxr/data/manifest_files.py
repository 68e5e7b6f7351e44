"""A manifest stored in pieces: Parquet files with a row group for each piece of work.

Workers are sent the places of their row groups instead of rows, so that neither the driver nor Ray's object store has
to hold the rows of all of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import storage
from cxr.data.shards import RowGroup

_PIECES_PER_FILE = 64  # a file's footer, which each reader of a piece reads first, describes so many
_THREADS = 8


def write_pieces(folder: str, pieces: Sequence[pa.Table]) -> list[RowGroup]:
    """Store each piece as a row group of a file in `folder`; returns where they are, in the same order."""

    def write(start: int) -> list[RowGroup]:
        uri, tables = (
            storage.join(folder, f"{start // _PIECES_PER_FILE:05d}.parquet"),
            pieces[start:][:_PIECES_PER_FILE],
        )
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, tables[0].schema, compression="zstd") as file:
            for table in tables:
                file.write_table(table, row_group_size=max(1, table.num_rows))
        storage.write_bytes(uri, sink.getvalue())
        return [RowGroup(uri, index, table.num_rows, ()) for index, table in enumerate(tables)]

    with ThreadPoolExecutor(_THREADS) as pool:
        written = pool.map(write, range(0, len(pieces), _PIECES_PER_FILE))
        return [group for groups in written for group in groups]


def read_piece(group: RowGroup) -> pa.Table:
    """The rows of a piece, with the schema and metadata with which it was written."""
    return storage.read_parquet(group.uri, row_groups=[group.index])
