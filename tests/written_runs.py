"""Scoring runs as `cxr score` leaves them, from tables of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cxr.data.run_ledger import Generation, Increment, RunLedger, folder_of, read_ledger


def write_scored(out: str | Path, settings: Mapping[str, Any], *files: pa.Table) -> str:
    """Write a run of one increment with these files of scores; returns its folder."""
    folder = Path(out, folder_of(0))
    folder.mkdir(parents=True)
    for number, table in enumerate(files):
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    images = sum(table.num_rows for table in files)
    write_ledger(out, settings, Increment(0, len(files), images, new=images, changed=0))
    return str(out)


def write_ledger(out: str | Path, settings: Mapping[str, Any], *increments: Increment) -> None:
    """Write the ledger of a run with one generation."""
    RunLedger(str(out), (Generation(dict(settings), "first run", "", increments=increments),)).write()


def settings_of(out: str | Path) -> dict[str, Any]:
    """What the scores of a run depend on."""
    generation = read_ledger(str(out)).latest
    assert generation
    return generation.settings


def set_settings(out: str | Path, settings: Mapping[str, Any]) -> None:
    """Replace the settings of a run."""
    read_ledger(str(out)).with_latest(settings=dict(settings)).write()
