"""Tables as text: Markdown for people, CSV for programs and spreadsheets.

Spreadsheets execute cells that begin with =, +, - or @, perhaps after a tab or a line break. In every CSV file, such
text gets an apostrophe in front, as OWASP recommends against CSV injection; numbers such as -1 do not.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_MAY_BE_FORMULA, _IS_NUMBER = r"^[=+\-@\t\r\n]", r"^-[0-9.]+$"  # for `re` and for Arrow's RE2


@dataclass(frozen=True)
class Table:
    """A table of cells that are ready to read."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        return markdown(self.head, self.rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too; line breaks in cells become spaces."""
    lines = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV of rows with the same keys, in the first one's order; see `csv_lines`."""
    return "".join(csv_lines(rows, list(rows[0])))


def csv_lines(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """A CSV file of these columns, a line at a time. Missing values, None and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, names))
    for row in rows:
        yield text.getvalue()
        text.seek(0)
        text.truncate()
        writer.writerow(_cell(row.get(name)) for name in names)
    yield text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if re.search(_MAY_BE_FORMULA, value) and not re.search(_IS_NUMBER, value) else value
    return "" if value is None or _is_nan(value) else value


def without_formulas(table: pa.Table) -> pa.Table:
    """The same table, without text that a spreadsheet takes for a formula."""
    columns = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            number = pc.match_substring_regex(column, _IS_NUMBER)
            formula = pc.and_not(pc.match_substring_regex(column, _MAY_BE_FORMULA), number)
            column = pc.if_else(formula, pc.binary_join_element_wise("'", column, ""), column)
        columns.append(column)
    return pa.table(columns, names=table.column_names)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def number(value: float, digits: int = 3) -> str:
    """A share to read; a dash where it could not be measured."""
    return "–" if math.isnan(value) else f"{value:z.{digits}f}"


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A share with its interval: "0.812 (0.790 to 0.831)"."""
    if math.isnan(low) or math.isnan(high):
        return number(value, digits)
    return f"{value:z.{digits}f} ({low:z.{digits}f} to {high:z.{digits}f})"
