"""Parts of a manifest are stored in files, and workers get only the places of their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.data import manifest_files
from cxr.data.ledger import Part, plan
from cxr.data.manifest_files import StoredPart, read_piece, write_parts, write_pieces
from cxr.data.ray_data import _key, _OnPart
from cxr.sources.manifest import labels_column, manifest_table


def manifest(rows: int) -> pa.Table:
    """Images of which most columns are unknown; their ids are in random order."""
    ids = pa.array([f"{row:05d}.png" for row in np.random.default_rng(0).permutation(rows)])
    boxes = [[{schema.LABEL: "Mass", schema.X_MIN: 1.0}] if row % 3 == 0 else None for row in range(rows)]
    columns = {
        schema.IMAGE_ID: ids,
        schema.SOURCE_URI: ids,
        schema.LABELS: labels_column(np.ones((rows, 2), np.int8)),
    }
    columns[schema.BOXES] = pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type)
    return manifest_table(columns, 1024)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StoredPart]:
    monkeypatch.setattr(manifest_files, "_PIECES_PER_FILE", 3)
    return write_parts(str(tmp_path), plan(manifest(40), 4))


def test_stored_parts_are_those_of_the_plan(stored: list[StoredPart]) -> None:
    parts = list(plan(manifest(40), 4))
    assert [(part.name, part.group.rows) for part in stored] == [(part.name, 4) for part in parts]
    assert len({part.group.uri for part in stored}) == 4
    for part, expected in zip(stored, parts, strict=True):
        assert part.read().rows.equals(expected.rows)
        assert part.read().rows.schema.metadata == expected.rows.schema.metadata
    assert read_piece(stored[1].group, [schema.IMAGE_ID]).column_names == [schema.IMAGE_ID]


def test_workers_are_sent_a_place_and_read_the_rows(stored: list[StoredPart]) -> None:
    def work(part: Part) -> dict[str, object]:
        return {"ids": part.rows[schema.IMAGE_ID].to_pylist()}

    key = _key(stored[4])
    assert len(json.dumps(key)) < 300
    (reply,) = _OnPart(lambda: work, ())(pa.table({name: [value] for name, value in key.items()})).to_pylist()
    assert reply["name"] == "part-00004"
    assert json.loads(reply["summary"]) == {"ids": [f"{row:05d}.png" for row in range(16, 20)]}


def test_few_pieces_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "_PIECES_PER_FILE", 2)
    most = 0

    def pieces() -> Iterator[pa.Table]:
        nonlocal most
        for _ in range(200):
            most = max(most, pa.total_allocated_bytes())
            yield pa.table({"pixels": [bytes(1 << 20)]})

    before = pa.total_allocated_bytes()
    assert len(write_pieces(str(tmp_path), pieces())) == 200
    assert most - before < 60 << 20
