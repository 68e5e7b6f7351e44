"""The code of docs/how-to/nightly.md that reads a run's increments as one table, with pandas and with DuckDB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.data.run_ledger import REMOVED, Generation, Increment, OpenIncrement, RunLedger, removed_file, score_file
from cxr.evaluation.run import read_run, read_scores
from tests.documented_queries import state_by_duckdb, state_by_pandas
from tests.export.scored_parts import image, part

SETTINGS = {"archive": "/archive", "checkpoint_sha256": "0" * 64, "recipe": {"family": "classify"}}


def increment(number: int, files: int, **values: Any) -> Increment:
    return Increment(number, files, images=2 * files, new=2 * files, changed=0, **values)


FIRST = (increment(0, 2), increment(1, 1, removed=1))
GENERATIONS: Mapping[str, tuple[Generation, ...]] = {
    "one increment": (Generation(SETTINGS, "", "", FIRST[:1]),),
    "changed and removed images": (Generation(SETTINGS, "", "", FIRST),),
    "the first run is not complete": (Generation(SETTINGS, "", "", (increment(0, 2, remaining=5),)),),
    "the first run was completed later": (
        Generation(SETTINGS, "", "", (increment(0, 2, remaining=2), increment(1, 1, removed=1))),
    ),
    "a new generation is not complete": (
        Generation(SETTINGS, "", "", FIRST),
        Generation(SETTINGS, "", "", (increment(2, 1, remaining=3),)),
    ),
    "a new generation has only begun": (
        Generation(SETTINGS, "", "", FIRST),
        Generation(SETTINGS, "", "", open=OpenIncrement(2, 2, 0)),
    ),
    "a new generation": (Generation(SETTINGS, "", "", FIRST), Generation(SETTINGS, "", "", (increment(2, 1),))),
}


@pytest.mark.parametrize("state", GENERATIONS)
def test_documented_code_reads_what_reports_read(state: str, tmp_path: Path) -> None:
    for number, file, ids in ((0, 0, "ab"), (0, 1, "cd"), (1, 0, "be"), (2, 0, "bc")):
        write(score_file(str(tmp_path), number, file), number, ids)
    write(removed_file(str(tmp_path), 1), 1, "a", error=REMOVED)
    RunLedger(str(tmp_path), GENERATIONS[state]).write()
    parts = read_scores(read_run(str(tmp_path)), [schema.IMAGE_ID, schema.INCREMENT])
    read = {row[schema.IMAGE_ID]: row[schema.INCREMENT] for part in parts for row in part.to_pylist()}
    assert state_by_pandas(tmp_path) == read
    assert state_by_duckdb(tmp_path) in (read, None)


def write(uri: str, number: int, ids: str, **values: Any) -> None:
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    rows = part("classify", [image(name, **values) for name in ids])
    pq.write_table(rows.append_column(schema.INCREMENT, pa.array([number] * len(ids), pa.int32())), uri)
