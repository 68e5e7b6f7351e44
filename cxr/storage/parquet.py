"""Read Parquet files by URI, with the retries and the errors of all other files."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr.storage.filesystems import check_regular, filesystem
from cxr.storage.retries import retried
from cxr.storage.uri import is_local


def read_parquet(uri: str, *, row_group: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file or one of its row groups; `columns` are returned in the file's order.

    Raises:
        StorageError: it cannot be read.
        pyarrow.ArrowInvalid: it is not a Parquet file.
    """
    column_list = None if columns is None else list(columns)

    def read() -> pa.Table:
        files, path = _filesystem_and_path(uri)
        with pq.ParquetFile(path, filesystem=files, pre_buffer=True) as file:
            if row_group is None:
                return file.read(column_list, use_threads=False)
            return file.read_row_group(row_group, columns=column_list, use_threads=False)

    return retried(uri, read)


def _filesystem_and_path(uri: str) -> tuple[fs.FileSystem, str]:
    files, path = filesystem(uri)
    if is_local(uri):
        check_regular(path)
    return files, path


def read_parquet_footer(uri: str) -> pq.FileMetaData:
    """A Parquet file's schema, row counts and key-value metadata, without its rows; raises like `read_parquet`."""

    def read() -> pq.FileMetaData:
        files, path = _filesystem_and_path(uri)
        return pq.read_metadata(path, filesystem=files)

    return retried(uri, read)
