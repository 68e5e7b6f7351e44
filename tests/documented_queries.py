"""Runs the code of docs/how-to/nightly.md that reads the increments of a run as one table."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from cxr import schema

_PAGE = Path(__file__).parents[1] / "docs/how-to/nightly.md"


def state_by_pandas(out: Path) -> dict[str, int]:
    """The increment of each image."""
    variables: dict[str, Any] = {}
    exec(_code("python", out), variables)
    scores: pd.DataFrame = variables["scores"]
    return dict(zip(scores[schema.IMAGE_ID], scores[schema.INCREMENT], strict=True))


def state_by_duckdb(out: Path) -> dict[str, int] | None:
    """The increment of each image; None without DuckDB, which cxr does not need."""
    if find_spec("duckdb") is None:
        return None
    import duckdb  # pyright: ignore[reportMissingImports]

    return dict(duckdb.sql(_code("sql", out)).select(schema.IMAGE_ID, schema.INCREMENT).fetchall())


def _code(language: str, out: Path) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    return code.replace("OUT", str(out))
