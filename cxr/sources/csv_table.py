"""Read CSV files: published lists, and copies of them saved by other software.

Text is UTF-8, with or without a byte order mark, or UTF-16 with one. Lines end with LF, CRLF or CR. Values are
separated by commas, semicolons or tabs and may be quoted. Column names and values are trimmed. Blank lines, and
blank fields after a row's last column, are ignored.
"""

from __future__ import annotations

import codecs
import csv
import functools
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from cxr import storage
from cxr.errors import UserError

_SEPARATORS = (",", ";", "\t")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HEADER_BYTES = 1 << 16  # a header may not be longer
_SHOWN = 60  # maximum length of a value in an error message
_BLOCK_BYTES = 1 << 24  # that Arrow reads at a time; files with longer rows are read without it
_FIELD_LIMIT = 2**31 - 1  # characters; the csv module's default of 131,072 is too short for long mask codes


class CsvTable:
    """A CSV file's rows as text, in Arrow columns.

    Args:
        header: column names. They are unique regardless of case, except blank ones.
        columns: a column of strings without nulls for each name.
        lines: each row's line number in the file, from 1, for error messages; None: found when it is needed.
    """

    def __init__(
        self,
        location: str,
        header: Sequence[str],
        columns: Sequence[pa.ChunkedArray],
        lines: Sequence[int] | None = None,
    ) -> None:
        self.location, self.header, self._columns, self._lines = location, header, columns, lines

    def __contains__(self, name: str) -> bool:
        return folded(name) in map(folded, self.header)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._columns[0]) if self._columns else 0

    def position(self, name: str) -> int:
        """The index of a column, from 0. The case of its name is ignored."""
        return list(map(folded, self.header)).index(folded(name))

    def texts(self, column: str | int) -> pa.ChunkedArray:
        """A column's values, by its name or its index."""
        return self._columns[self.position(column) if isinstance(column, str) else column]

    def column(self, name: str) -> list[str]:
        """A column's values as a list, for files of a moderate size."""
        return self.texts(name).to_pylist()

    @cached_property
    def rows(self) -> list[list[str]]:
        """All values as lists, for files of a moderate size."""
        return [list(row) for row in zip(*(column.to_pylist() for column in self._columns), strict=True)]

    @property
    def lines(self) -> Sequence[int]:
        if self._lines is None:
            self._lines = _read_rows(self.location, ())[2]
        return self._lines

    def error(self, row: int, expected: str, got: str) -> UserError:
        """The error to raise for an invalid value in a row (an index into `rows`)."""
        return _error(self.location, self.lines[row], expected, quoted(got))


def read_csv(location: str, columns: Sequence[str]) -> CsvTable:
    """Read a CSV file that has at least these columns.

    Raises:
        UserError: a column is missing or repeated, a row has too few or too many fields, a quote is not closed on its
            line, or the file is not text; the message names the line.
        StorageError: the file cannot be read.
    """
    if table := _read_plain(location, columns):
        return table
    header, rows, lines = _read_rows(location, columns)
    texts = [pa.chunked_array([pa.array([row[at] for row in rows], pa.string())]) for at in range(len(header))]
    return CsvTable(location, header, texts, lines)


def _read_plain(location: str, columns: Sequence[str]) -> CsvTable | None:
    """Read a file with Arrow if it is UTF-8 without quotes and every row has as many fields as the header.

    None for other files, which `_read_rows` reads, more slowly, or explains what is wrong with them.
    """
    data = storage.read_bytes(location).removeprefix(codecs.BOM_UTF8)
    lone_returns = data.count(b"\r") - data.count(b"\r\n")
    if data.startswith(UTF16_MARKS) or b'"' in data or b"\0" in data or lone_returns:
        return None
    lines = _lines(data[:HEADER_BYTES].decode("utf-8", "replace"))
    start, separator = find_header(lines)
    rows_at = 0
    for _ in range(start + 1):
        rows_at = data.find(b"\n", rows_at) + 1
        if not rows_at:
            return None
    header = [name.strip() for name in lines[start].split(separator)]
    if not any(header) or len(lines) <= start + 1:
        return None
    check_header(location, start + 1, header, columns)
    names = [f"f{number}" for number in range(len(header))]
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(pa.py_buffer(data).slice(rows_at)),
            arrow_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=names),
            arrow_csv.ParseOptions(delimiter=separator, quote_char=False),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid:
        return None
    del data  # the columns take as much memory again, so that each is freed once it is trimmed
    texts: list[pa.ChunkedArray] = []
    for name in names:
        texts.append(pc.utf8_trim_whitespace(table[name]))
        table = table.drop_columns(name)
    blank = [pc.equal(column, "") for column in texts]
    empty = functools.reduce(pc.and_, blank)
    if pc.any(empty).as_py():
        texts = [column.filter(pc.invert(empty)) for column in texts]
    return CsvTable(location, header, texts)


def _read_rows(location: str, columns: Sequence[str]) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows that are not blank, and their line numbers from 1; raises as `read_csv`."""
    lines = read_lines(location)
    start, separator = find_header(lines)
    if not lines[start].strip():
        named = f" with the columns {', '.join(columns)}" if columns else ""
        raise UserError(f"{location}: expected a header{named}, got an empty file")
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(islice(lines, start, None), delimiter=separator, skipinitialspace=True, strict=True)
    rows: list[list[str]] = []
    numbers: list[int] = []
    line = start  # number of the last line read
    try:
        header = [name.strip() for name in next(reader)]
        line += 1
        check_header(location, line, header, columns)
        columns_with_name = _filled(header)
        for values in reader:
            line += 1
            if start + reader.line_num != line:
                raise _error(location, line, "a closing quote on the same line", "none")
            row = [value.strip() for value in values]
            if len(row) != len(header):
                filled = _filled(row)
                if filled > len(header) or (filled and len(row) < columns_with_name):
                    raise _error(location, line, f"{columns_with_name} fields, as in the header", str(len(row)))
                row = [*row, *[""] * len(header)][: len(header)]
            if any(row):
                rows.append(row)
                numbers.append(line)
    except csv.Error as error:
        raise _error(location, line + 1, "quoted fields as in RFC 4180", f"an error: {error}") from None
    return header, rows, numbers


def has_columns(location: str, columns: Sequence[str]) -> bool:
    """Whether the file's header has these columns; the rest of the file is not read.

    Raises:
        StorageError: the file cannot be read.
    """
    start_of_file, _ = storage.read_start(location, HEADER_BYTES)
    lines = _lines(_decoded(start_of_file, "replace"))
    start, separator = find_header(lines)
    try:
        header = next(csv.reader([lines[start]], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return False
    return set(map(folded, columns)) <= set(map(folded, header))


def read_lines(location: str) -> list[str]:
    """The lines of a text file without line ends, in all encodings and with all line ends that CSV files may have.

    Raises:
        UserError: the file is not text.
        StorageError: the file cannot be read.
    """
    data = storage.read_bytes(location)
    try:
        text = _decoded(data, "strict")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = "bytes in another encoding: save the file as UTF-8"
        raise _error(location, line, "UTF-8, or UTF-16 with a byte order mark", got) from None
    if "\0" in text:
        raise UserError(f"{location}: expected UTF-8 text, got NUL characters: save the file as UTF-8")
    return _lines(text)


def _decoded(data: bytes, errors: str) -> str:
    return data.decode("utf-16" if data.startswith(UTF16_MARKS) else "utf-8-sig", errors)


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def find_header(lines: Sequence[str]) -> tuple[int, str]:
    """The number of blank lines before the header, and the most frequent separator in the header."""
    start = next((at for at, line in enumerate(lines) if line.strip()), 0)
    return start, max(_SEPARATORS, key=lines[start].count)


def check_header(location: str, line: int, header: Sequence[str], columns: Sequence[str]) -> None:
    names = Counter(folded(name) for name in header if name)
    missing = [name for name in columns if folded(name) not in names]
    if missing:
        got = f"{_filled(header)} columns without {', '.join(missing)}"
        raise _error(location, line, f"the columns {', '.join(columns)}", got)
    name, count = next(iter(names.most_common(1)), ("", 0))
    if count > 1:
        raise _error(location, line, f"one column {quoted(name)}", str(count))


def _filled(row: Sequence[str]) -> int:
    """The number of fields without trailing blank ones."""
    return next((at for at in range(len(row), 0, -1) if row[at - 1]), 0)


def folded(name: str) -> str:
    return name.strip().casefold()


def quoted(value: str) -> str:
    return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "…")


def _error(location: str, line: int, expected: str, got: str) -> UserError:
    return UserError(f"{location}, line {line}: expected {expected}, got {got}")
