"""Archives and shards as datasets of the same rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
from ray.data import Dataset

from cxr import schema
from cxr.data.ingest import ingest
from cxr.data.ledger import Part, plan
from cxr.data.ray_data import map_parts, open_dataset, open_streams
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from tests.ray.archives import BAD, GOOD, write_archive

pytestmark = pytest.mark.ray
PIXELS = PixelFormat(size=32)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_archive(tmp_path_factory.mktemp("dataset") / "archive")


@pytest.fixture(scope="module")
def shards_uri(archive: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("dataset") / "shards"
    return ingest(archive, str(out), pixels=PIXELS, max_rejects=1).shards


def rows_of(dataset: Dataset) -> pa.Table:
    batches = list(dataset.iter_batches(batch_size=16, batch_format="pyarrow"))
    return pa.concat_tables(cast(list[pa.Table], batches)).sort_by(schema.IMAGE_ID)


def test_archive_and_shards_give_the_same_rows(archive: str, shards_uri: str) -> None:
    decoded = rows_of(open_dataset(archive, pixels=PIXELS))
    stored = rows_of(open_dataset(shards_uri))
    good = decoded.filter(decoded[schema.ERROR].is_null())
    assert decoded.num_rows == GOOD + BAD
    assert stored.equals(good)
    for rows in (decoded, stored):
        assert schema.pixel_format(rows.schema) == PIXELS


def test_split_and_columns_are_chosen(archive: str, shards_uri: str) -> None:
    columns = [schema.IMAGE_ID, schema.SPLIT]
    for uri in (archive, shards_uri):
        rows = rows_of(open_dataset(uri, split="val", columns=columns, pixels=PIXELS))
        assert rows.column_names == columns
        assert set(rows[schema.SPLIT].to_pylist()) == {"val"}


def test_a_split_without_images_is_refused(archive: str, shards_uri: str) -> None:
    for uri in (archive, shards_uri):
        with pytest.raises(UserError, match="no image in its vall split"):
            open_dataset(uri, split="vall")


def test_unfinished_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(UserError, match="did not finish"):
        open_dataset(str(tmp_path))


def test_streams_hold_the_good_images_of_each_split(archive: str, shards_uri: str) -> None:
    streams, findings, rows = open_streams(archive, size=32)
    assert findings == ()
    for split in ("train", "val"):
        wanted = rows_of(open_dataset(shards_uri, split=split, columns=[schema.IMAGE_ID]))
        assert rows_of(streams[split])[schema.IMAGE_ID].equals(wanted[schema.IMAGE_ID])
        assert rows[split] >= wanted.num_rows


class Counter:
    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __call__(self, part: Part) -> dict[str, object]:
        if part.name == self.wrong:
            raise UserError("the bucket is gone: make it again")
        return {"name": part.name, "rows": part.rows.num_rows, "worker": os.getpid()}


def test_each_part_is_worked_on_once(archive: str, ray_cluster: None) -> None:
    parts = plan(open_manifest(archive).table, 5)
    summaries = list(map_parts(parts, Counter, ("",)))
    assert sorted((s["name"], s["rows"]) for s in summaries) == [(p.name, p.rows.num_rows) for p in parts]
    assert os.getpid() not in {s["worker"] for s in summaries}


def test_a_users_mistake_comes_back_as_such(archive: str, ray_cluster: None) -> None:
    parts = plan(open_manifest(archive).table, GOOD + BAD)
    with pytest.raises(UserError) as mistake:
        list(map_parts(parts, Counter, ("part-00000",)))
    assert str(mistake.value) == "the bucket is gone: make it again"


def test_a_failure_that_is_not_the_users_stays_what_it_is(archive: str, ray_cluster: None) -> None:
    def work(part: Part) -> dict[str, object]:
        raise ZeroDivisionError("a bug")

    parts = plan(open_manifest(archive).table, GOOD + BAD)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(map_parts(parts, lambda: work))
