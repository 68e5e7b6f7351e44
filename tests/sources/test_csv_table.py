"""CSV files as published and as saved by other software, and errors for damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr.errors import UserError
from cxr.sources.csv_table import CsvTable, has_columns, read_csv

COLUMNS = ("name", "finding")
LINES = ["name, finding,more", "a.png,Mass,1", " b.png , No Finding,2", '"c,1.png","Mass|Edema",3']
ROWS = [["a.png", "Mass", "1"], ["b.png", "No Finding", "2"], ["c,1.png", "Mass|Edema", "3"]]


def read(folder: Path, data: str | bytes, columns: tuple[str, ...] = COLUMNS) -> CsvTable:
    (folder / "t.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_csv(str(folder / "t.csv"), columns)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_encodings_do_not_matter(tmp_path: Path, end: str, encoding: str) -> None:
    table = read(tmp_path, end.join([*LINES, "", " ", ""]).encode(encoding))
    assert table.header == ["name", "finding", "more"]
    assert table.rows == ROWS
    assert table.lines == [2, 3, 4]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_semicolons_and_tabs_separate_as_commas_do(tmp_path: Path, separator: str) -> None:
    text = "\n".join(LINES[:3]).replace(",", separator) + f'\n"c,1.png"{separator}Mass|Edema{separator}3'
    assert read(tmp_path, text).rows == ROWS
    assert has_columns(str(tmp_path / "t.csv"), COLUMNS)


def test_blank_lines_rows_and_fields_at_the_end_are_ignored(tmp_path: Path) -> None:
    table = read(tmp_path, "\n\nname,finding,,\n\na,Mass\nb,Mass,,,,\nc,Mass,note\n,,,,,\n,\n\n")
    assert table.header == ["name", "finding", "", ""]
    assert table.rows == [["a", "Mass", "", ""], ["b", "Mass", "", ""], ["c", "Mass", "note", ""]]
    assert table.lines == [5, 6, 7]


def test_a_field_of_any_length_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, f"name,finding\na,{'1 ' * 200_000}\n").column("finding") == [("1 " * 200_000).strip()]


def test_columns_are_found_regardless_of_case_and_order(tmp_path: Path) -> None:
    table = read(tmp_path, ",Finding,NAME\n0,Mass,a\n")
    assert (table.column("name"), table.column("finding"), table.column("")) == (["a"], ["Mass"], ["0"])
    assert "finding" in table
    assert "more" not in table


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        ("", "expected a header with the columns name, finding, got an empty file"),
        ("\n\n", "expected a header with the columns name, finding, got an empty file"),
        ('\n"name,finding\n', "line 2: expected quoted fields as in RFC 4180"),
        ("\nname,more\n", "line 2: expected the columns name, finding, got 2 columns without finding"),
        ("name,finding,Name\n", "line 1: expected one column 'name', got 2"),
        ("name,finding," + ",".join(map(str, range(100_000))) + ",7\n", "line 1: expected one column '7', got 2"),
        ("name,finding\na,b\nc\n", "line 3: expected 2 fields, as in the header, got 1"),
        ("name,finding\n\na,b,c\n", "line 3: expected 2 fields, as in the header, got 3"),
        ('name,finding\na,b\nc,"d\ne,f\n', "line 3: expected quoted fields as in RFC 4180, got .* end of data"),
        ('name,finding\na,"b\nc",d\n', "line 2: expected a closing quote on the same line"),
        ('name,finding\na,"b"c\n', "line 2: expected quoted fields as in RFC 4180"),
        (b"name,finding\na,\xe4\n", "line 2: expected UTF-8, .*save the file as UTF-8"),
        ("name,finding\na,b\n".encode("utf-16-le"), "expected UTF-8 text, got NUL characters"),
        (b"\xff\xfen", "expected UTF-8, or UTF-16 with a byte order mark, got bytes in another encoding"),
        (bytes(range(256)), "expected UTF-8"),
    ],
)
def test_damaged_files_are_errors_with_the_line(tmp_path: Path, data: str | bytes, trouble: str) -> None:
    with pytest.raises(UserError, match=f"t.csv.*{trouble}"):
        read(tmp_path, data)


def test_an_error_for_a_value_names_its_line(tmp_path: Path) -> None:
    table = read(tmp_path, f"name,finding\n\na,{'x' * 500}\n")
    error = table.error(0, "a finding", table.rows[0][1])
    assert str(error) == f"{tmp_path}/t.csv, line 3: expected a finding, got '{'x' * 60}…'"


def test_has_columns_reads_only_the_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf Name;finding\n\xff,\0\n")
    assert has_columns(str(tmp_path / "t.csv"), COLUMNS)
    assert not has_columns(str(tmp_path / "t.csv"), ("name", "more"))
    (tmp_path / "t.csv").write_bytes(b'"name,finding\n')
    assert not has_columns(str(tmp_path / "t.csv"), COLUMNS)
    (tmp_path / "t.csv").write_bytes(b"")
    assert not has_columns(str(tmp_path / "t.csv"), COLUMNS)


def test_an_empty_file_that_may_have_any_columns_lacks_a_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a header, got an empty file"):
        read(tmp_path, "", ())
