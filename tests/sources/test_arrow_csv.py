"""Long CSV files read with Arrow: the same files as the plain reader, gzip, and errors that contain no values."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cxr.errors import UserError
from cxr.sources.arrow_csv import has_columns, read_columns

ROWS = b"a,b,c\n1,2,3\n4,5,6\n"
SECRET = b"John Doe"


def columns(folder: Path, data: bytes, needed: tuple[str, ...] = ("A", "b")) -> dict[str, list[str]]:
    (folder / "list.csv").write_bytes(data)
    return read_columns(str(folder / "list.csv"), needed, ("other",)).to_pydict()


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        ROWS.rstrip(),
        gzip.compress(ROWS, mtime=0),
        b"\xef\xbb\xbf\n\n a , B,c\r\n 1 , 2,3\r\n\r\n4,5 ,6\r\n",
        ROWS.replace(b"\n", b"\r"),
        ROWS.replace(b",", b";"),
        ROWS.replace(b",", b"\t").decode().encode("utf-16"),
        b'"a","b",c\n"1","2",3\n"4",5,"6\n7"\n',
    ],
)
def test_columns_are_recognized_in_files_of_any_software(tmp_path: Path, data: bytes) -> None:
    assert columns(tmp_path, data) == {"A": ["1", "4"], "b": ["2", "5"], "other": ["", ""]}
    assert has_columns(str(tmp_path / "list.csv"), ("B", "a"))
    assert not has_columns(str(tmp_path / "list.csv"), ("a", "other"))


def test_values_may_contain_line_breaks_separators_and_quotes(tmp_path: Path) -> None:
    assert columns(tmp_path, b'a,b\n"x\ny, ""z""",2\n')["A"] == ['x\ny, "z"']


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (b"", "line 1: expected the columns A, b, got 0 columns without A, b"),
        (b"\n\nb,c\n1,2\n", "line 3: expected the columns A, b, got 2 columns without A"),
        (b"a,A,b\n1,2,3\n", "line 1: expected one column 'a', got 2"),
        (b"a,b", "expected a header and rows of UTF-8 text, got no rows"),
        (b"a,b\n", "expected a header and rows of UTF-8 text, got no rows"),
        (b"a,b\n1,2\n" + SECRET + b"\n3\n", "row 3: expected 2 fields, as in the header, got 1"),
        (b"a,b\n1,2,3\n", "row 2: expected 2 fields, as in the header, got 3"),
        (b"a,b\n" + SECRET + b"\xff,1\n", "got bytes in another encoding: save the file as UTF-8"),
        (b"a,b\n1,2\n" + b'"' + SECRET * (1 << 22), "got a row longer than 16 MiB: is a quote not closed?"),
        (gzip.compress(ROWS * 1000, mtime=0)[:-40], "expected a gzip file, got a damaged one|got a damaged file"),
        (b"\x1f\x8b" + SECRET, "expected a gzip file, got a damaged one: restore the file"),
    ],
)
def test_a_damaged_file_is_an_error_without_its_values(tmp_path: Path, data: bytes, trouble: str) -> None:
    with pytest.raises(UserError, match=rf"list.csv.*({trouble})") as raised:
        columns(tmp_path, data)
    assert SECRET.decode() not in str(raised.value)
