"""Shard files: written a row group at a time, so that memory does not grow with their size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.schema import PixelFormat
from cxr.storage.files import atomic_writer

FILE_BYTES, FILE_ROWS = 512 << 20, 1024  # of pixels in a file, and of images, which an interruption may cost
_GROUP_BYTES, _LARGEST_GROUP_BYTES = 8 << 20, 32 << 20  # of pixels in a row group, the unit of reading
_GROUP_ROWS = 32  # in a row group of larger pixels, whose footer would otherwise take as long to parse as its pixels


def row_group_rows(pixels: PixelFormat) -> int:
    """Rows of a row group: 8 MiB of pixels, or up to 32 MiB if these are fewer than 32 images."""
    large = min(_GROUP_ROWS, _LARGEST_GROUP_BYTES // pixels.row_bytes)
    return max(1, _GROUP_BYTES // pixels.row_bytes, large)


class ShardWriter:
    """Appends rows to a shard file; all row groups but the last have `row_group_rows(pixels)` rows."""

    def __init__(self, writer: pq.ParquetWriter, pixels: PixelFormat) -> None:
        self._writer, self._group_rows = writer, row_group_rows(pixels)
        self._waiting = schema.row_schema(pixels).empty_table()

    def add(self, rows: pa.Table) -> None:
        """Append good rows of `schema.row_schema(pixels)`."""
        rows = pa.concat_tables([self._waiting, rows])
        whole = rows.num_rows // self._group_rows * self._group_rows
        for start in range(0, whole, self._group_rows):
            self._writer.write_table(rows.slice(start, self._group_rows))
        self._waiting = rows.slice(whole)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the rows that are left, and `metadata` into the footer."""
        if self._waiting.num_rows:
            self._writer.write_table(self._waiting)
        self._writer.add_key_value_metadata(dict(metadata))


@contextmanager
def shard_writer(uri: str, pixels: PixelFormat) -> Iterator[ShardWriter]:
    """The writer of a shard file, which appears if the block ends without an exception.

    LZ4 costs a scan next to nothing; a dictionary or statistics of pixels would only take room.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        with (
            atomic_writer(uri) as stream,
            pq.ParquetWriter(
                stream,
                schema.row_schema(pixels),
                compression="lz4",
                use_dictionary=[schema.SPLIT, schema.VIEW, schema.PATIENT_ID],  # pyright: ignore[reportArgumentType]
                write_statistics=[schema.IMAGE_ID, schema.PATIENT_ID],  # pyright: ignore[reportArgumentType]
            ) as writer,
        ):
            yield ShardWriter(writer, pixels)
    except OSError as error:  # a full disk, for example
        raise storage.storage_error(uri, error) from error
