"""Tables as text: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table of cells that are ready to read."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        return markdown(self.head, self.rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV of rows with the same keys, in the first one's order; NaN is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if _is_nan(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


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
