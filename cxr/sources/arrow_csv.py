"""Read columns of a long CSV file with Arrow, for lists of hundreds of thousands of rows.

Such files may be compressed with gzip, and quoted values may contain line breaks. Otherwise they are those that
`csv_table` reads, except that every row must have as many fields as the header. Values are text, trimmed.
"""

from __future__ import annotations

import csv as python_csv
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from cxr import storage
from cxr.errors import UserError
from cxr.sources.csv_table import HEADER_BYTES, UTF16_MARKS, check_header, find_header, folded, quoted

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 1 << 24  # a row may not be longer
_TEXT = pa.string()
_WRONG_FIELDS = re.compile(r"Row #(?P<row>\d+): Expected (?P<expected>\d+) columns, got (?P<got>\d+)")
_NO_ROWS = "no rows: restore the file"


def locate(uri: str, file: str) -> str | None:
    """The location of `file` or `file`.gz in an archive's root; None if there is neither."""
    candidates = (storage.join(uri, name) for name in (file, f"{file}.gz"))
    return next((location for location in candidates if storage.exists(location)), None)


def has_columns(location: str, columns: Sequence[str]) -> bool:
    """Whether the file's header has these columns; the rest of the file is not read.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        _, header, _ = _header(location, _plain(storage.read_start(location, HEADER_BYTES)[0]))
    except UserError:
        return False
    return set(map(folded, columns)) <= set(map(folded, header))


def read_columns(location: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """Read these columns as strings without nulls, under these names; an optional one that is missing is blank.

    Args:
        columns: None: all that have a name.

    Raises:
        UserError: a column is missing or repeated, a row has too few or too many fields, there are no rows, or the
            file is not text.
        StorageError: the file cannot be read.
    """
    data = _plain(storage.read_bytes(location))
    header_line, header, separator = _header(location, data)
    columns = [name for name in header if name] if columns is None else columns
    check_header(location, header_line, header, columns)
    positions = {folded(name): f"f{number}" for number, name in enumerate(header)}  # Arrow's names
    present = {name: positions[folded(name)] for name in (*columns, *optional) if folded(name) in positions}
    try:
        table = csv.read_csv(
            _stream(data),
            csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, autogenerate_column_names=True),
            csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            csv.ConvertOptions(
                include_columns=[*present.values()], column_types=dict.fromkeys(present.values(), _TEXT)
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(location, str(error)) from None  # Arrow's message may contain the row
    rows = table.slice(1)  # without the header
    if not rows.num_rows:
        raise UserError(f"{location}: expected a header and rows of UTF-8 text, got {_NO_ROWS}")
    blank = pa.repeat(pa.scalar("", _TEXT), rows.num_rows)
    texts = {name: pc.utf8_trim_whitespace(rows[column]).combine_chunks() for name, column in present.items()}
    return pa.table({name: texts.get(name, blank) for name in (*columns, *optional)})


def invalid_value(location: str, row: int, expected: str, got: str) -> UserError:
    """The error to raise for an invalid value in a row of `read_columns`."""
    return UserError(f"{location}, row {row + 2}: expected {expected}, got {quoted(got)}")


def _plain(data: bytes) -> bytes:
    """UTF-16 as UTF-8; other data unchanged."""
    return data.decode("utf-16", "replace").encode() if data.startswith(UTF16_MARKS) else data


def _stream(data: bytes) -> pa.NativeFile:
    stream = pa.BufferReader(data)
    return pa.CompressedInputStream(stream, "gzip") if data.startswith(_GZIP_MAGIC) else stream


def _header(location: str, data: bytes) -> tuple[int, list[str], str]:
    """The header's line number from 1, its column names, and the separator."""
    try:
        head = _stream(data).read(HEADER_BYTES)
    except OSError:
        raise UserError(f"{location}: expected a gzip file, got a damaged one: restore the file") from None
    lines = head.decode("utf-8-sig", "replace").splitlines() or [""]
    start, separator = find_header(lines)
    try:
        names = next(python_csv.reader([lines[start]], delimiter=separator, skipinitialspace=True), [])
    except python_csv.Error:
        names = []
    return start + 1, [name.strip() for name in names], separator


def _unreadable(location: str, message: str) -> UserError:
    """The error to raise for a message of Arrow, without the values that it may contain."""
    if fields := _WRONG_FIELDS.search(message):
        expected = f"{fields['expected']} fields, as in the header"
        return UserError(f"{location}, row {fields['row']}: expected {expected}, got {fields['got']}")
    got = "a damaged file: restore it"
    if "Empty CSV file" in message:  # a header without a line break
        got = _NO_ROWS
    elif "straddling" in message:
        got = f"a row longer than {_BLOCK_BYTES >> 20} MiB: is a quote not closed?"
    elif "UTF8" in message:
        got = "bytes in another encoding: save the file as UTF-8"
    return UserError(f"{location}: expected a header and rows of UTF-8 text, got {got}")
