"""What is sent to workers: its size grows with the number of images, not with its square."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.data.ledger import rows_at
from cxr.data.ray_data import packed, unpacked
from cxr.sources.manifest import labels_column, manifest_table

STEP = 64


def manifest(rows: int) -> pa.Table:
    """Images of which most columns are unknown, among them the masks."""
    ids = pa.array([f"{row:08d}.png" for row in range(rows)])
    boxes = [[{schema.LABEL: "Mass", schema.X_MIN: 1.0}] if row % 3 == 0 else None for row in range(rows)]
    labels = labels_column(np.zeros((rows, 14), np.int8))
    boxes = pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type)
    columns = {schema.IMAGE_ID: ids, schema.SOURCE_URI: ids, schema.LABELS: labels, schema.BOXES: boxes}
    return manifest_table(columns)


def key_bytes(table: pa.Table) -> int:
    return sum(len(packed(table.slice(start, STEP))) for start in range(0, table.num_rows, STEP))


@pytest.mark.parametrize("shuffled", [False, True])
def test_keys_have_the_same_size_in_a_long_list(shuffled: bool) -> None:
    few, many = manifest(1024), manifest(8192)
    if shuffled:
        few, many = (rows_at(table, pa.array(np.arange(table.num_rows))) for table in (few, many))
    assert key_bytes(many) == pytest.approx(8 * key_bytes(few), rel=0.01)
    assert key_bytes(few) < 300 * few.num_rows


def test_a_key_contains_its_rows() -> None:
    rows = manifest(200).slice(70, 90)
    cell = pa.array([packed(rows)])[0]
    assert unpacked(cell).equals(rows)
