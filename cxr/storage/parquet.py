"""Read Parquet files by URI, with the retries and the errors of all other files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr.storage import s3
from cxr.storage.filesystems import check_regular, filesystem
from cxr.storage.retries import retried
from cxr.storage.uri import is_local

_KEPT = 2048  # row groups in the footers that a reader keeps; rows of 34 columns take 36 KB for each


def read_parquet(
    uri: str, *, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a Parquet file or some of its row groups; `columns` are returned in the file's order.

    Raises:
        StorageError: it cannot be read.
        pyarrow.ArrowInvalid: it is not a Parquet file.
    """
    column_list = None if columns is None else list(columns)

    def read() -> pa.Table:
        files, path = _filesystem_and_path(uri)
        with pq.ParquetFile(path, filesystem=files, pre_buffer=True) as file:
            if row_groups is None:
                return file.read(column_list, use_threads=False)
            return file.read_row_groups(list(row_groups), columns=column_list, use_threads=False)

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


class RowGroupReader:
    """Reads row groups of files that do not change, also in several threads.

    It keeps the footers of the last files, so that another row group of one of them takes one request on S3, and the
    first takes two. Their memory is limited to some 75 MB.
    """

    def __init__(self) -> None:
        self._footers, self._kept = OrderedDict[str, tuple[pq.FileMetaData, int]](), 0
        self._lock = threading.Lock()

    def read(self, uri: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of a row group, in the file's order; raises like `read_parquet`."""

        def read() -> pa.Table:
            with self._lock:
                footer, size = self._footers.get(uri, (None, None))
            with _open(uri, size) as source, pq.ParquetFile(source, metadata=footer, pre_buffer=True) as file:
                if footer is None:
                    self._keep(uri, file.metadata, source.size())
                return file.read_row_group(row_group, columns=list(columns), use_threads=False)

        return retried(uri, read)

    def _keep(self, uri: str, footer: pq.FileMetaData, size: int) -> None:
        with self._lock:
            if uri not in self._footers:
                self._footers[uri] = footer, size
                self._kept += footer.num_row_groups
            while self._kept > _KEPT:
                self._kept -= self._footers.popitem(last=False)[1][0].num_row_groups


def _open(uri: str, size: int | None) -> pa.NativeFile:
    files, path = _filesystem_and_path(uri)
    if uri.startswith("s3://"):
        return pa.PythonFile(s3.RangeReader(*s3.split(path), size), mode="r")
    return files.open_input_file(path)
