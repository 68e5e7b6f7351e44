"""Which images of an archive are planned to be scored."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cxr import schema, storage
from cxr.data.shards import REJECTS_FILE
from cxr.errors import UserError
from cxr.inference.plan import list_images
from cxr.inference.read import PART_ROWS, SHARD
from cxr.phantom.archive import write_phantom
from cxr.sources.options import ReadOptions
from tests.made_shards import write_shards


def test_only_the_images_of_a_split_of_shards(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 30, "test": 25})
    storage.write_json(f"{made}/archive.json", storage.read_json(f"{made}/archive.json") | {"rejects": 2})
    everything = list_images(made, ReadOptions()).rows
    assert pc.sum(everything[PART_ROWS]).as_py() == 57
    assert everything[SHARD].to_pylist()[-1] == f"{made}/{REJECTS_FILE}"
    rows = list_images(made, ReadOptions(), "test").rows
    assert pc.sum(rows[PART_ROWS]).as_py() == 25
    assert all("/test/" in file for file in rows[SHARD].to_pylist())
    with pytest.raises(UserError, match=r"images in the val split of .*shards, got none: use another --split"):
        list_images(made, ReadOptions(), "val")


def test_only_the_images_of_a_split_of_an_archive(tmp_path: Path) -> None:
    write_phantom(str(tmp_path), 24, size=64)
    everything, rows = (list_images(str(tmp_path), ReadOptions(), split).rows for split in ("all", "test"))
    expected = everything.filter(pc.equal(everything[schema.SPLIT], "test"))
    assert 0 < rows.num_rows < everything.num_rows == 24
    assert rows.equals(pa.table(expected))
