"""Read a whole table as text: CSV in any form that spreadsheets write, or Parquet."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import storage
from cxr.errors import UserError
from cxr.sources.arrow_csv import read_columns
from cxr.sources.csv_table import read_csv

LIST_SEPARATOR = "|"  # joins the values of a Parquet column of lists
_PARQUET = b"PAR1"
_EXCEL = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # xlsx, xls


def read_table(location: str) -> pa.Table:
    """All columns with a name, as trimmed text without nulls.

    CSV files may have commas, semicolons or tabs between fields, be UTF-8 or UTF-16, and be compressed with gzip.

    Raises:
        UserError: it is not such a file, it has no rows, or a column name occurs twice.
        StorageError: it cannot be read.
    """
    data = storage.read_bytes(location)
    if data.startswith(_EXCEL):
        raise UserError(f"{location}: expected CSV, TSV or Parquet, got an Excel workbook: save it as CSV (UTF-8)")
    if data.startswith(_PARQUET):
        return _parquet(location, data)
    try:
        return read_columns(location)
    except UserError as error:
        if "fields, as in the header" not in str(error):
            raise
    table = read_csv(location, ())  # accepts blank fields after the last column; its errors name the line
    names = [name for name in table.header if name]
    return pa.table({name: pa.array(table.column(name), pa.string()) for name in names})


def _parquet(location: str, data: bytes) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(data))
        columns = {name: _text(table[name]) for name in table.column_names if name}
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{location}: expected a Parquet table, got an error ({reason}): restore it") from None
    if not table.num_rows:
        raise UserError(f"{location}: expected rows, got none: restore the file")
    return pa.table({name: text for name, text in columns.items() if text is not None})


def _text(column: pa.ChunkedArray) -> pa.Array | None:
    """The column as text, "" for null; None if its type has no text form."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = _joined(column.cast(pa.list_(pa.string())))
    elif pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return None
    return pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), "")).combine_chunks()


def _joined(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts of each list, joined; a null in a list is a blank."""
    lists = pa.concat_arrays(column.chunks)
    values = pc.fill_null(lists.values, "")
    filled = pa.ListArray.from_arrays(lists.offsets, values, mask=lists.is_null())
    return pa.chunked_array([pc.binary_join(filled, LIST_SEPARATOR)])
