"""Raw archives as datasets of the same rows as shards, and work on parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
from ray.data import Dataset

from cxr import schema, storage
from cxr.data import shards
from cxr.data.ingest import ingest
from cxr.data.ledger import Part, plan
from cxr.data.ray_data import map_parts, open_streams
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


def test_streams_have_the_rows_of_shards(archive: str, shards_uri: str) -> None:
    """The usable images of both splits, in any order."""
    streams, manifest = open_streams(archive, PIXELS.size)
    info = shards.read_info(shards_uri)
    assert manifest.table.num_rows == GOOD + BAD
    assert manifest.findings == info.findings
    for split in ("train", "val"):
        rows = rows_of(streams[split])
        stored = pa.concat_tables([storage.read_parquet(file.uri) for file in info.parts[split]])
        checked = [schema.GATE, schema.GATE_SCORE]  # by ingest, not by streams into training
        assert rows.drop_columns(checked).equals(stored.sort_by(schema.IMAGE_ID).drop_columns(checked))
        assert schema.pixel_format(rows.schema) == PIXELS


def test_streams_have_the_chosen_columns(archive: str, ray_cluster: None) -> None:
    columns = [schema.IMAGE_ID, schema.SPLIT]
    streams, _ = open_streams(archive, PIXELS.size, columns=columns)
    rows = rows_of(streams["val"])
    assert rows.column_names == columns
    assert set(rows[schema.SPLIT].to_pylist()) == {"val"}


def test_a_split_without_images_is_rejected(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", good=1)
    for number in range(BAD):
        (Path(archive) / f"torn-{number}.png").unlink()
    with pytest.raises(UserError, match=r"has no image in its (train|val) split"):
        open_streams(archive, PIXELS.size)


class Counter:
    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __call__(self, part: Part) -> dict[str, object]:
        if part.name == self.wrong:
            raise UserError("the bucket is gone: make it again")
        return {"name": part.name, "rows": part.rows.num_rows, "worker": os.getpid()}


def test_each_part_is_processed_once(archive: str, ray_cluster: None) -> None:
    parts = plan(open_manifest(archive).table, 5)
    summaries = list(map_parts(parts, Counter, ("",)))
    assert sorted((s["name"], s["rows"]) for s in summaries) == [(p.name, p.rows.num_rows) for p in parts]
    assert os.getpid() not in {s["worker"] for s in summaries}


def test_a_user_error_on_a_worker_is_raised_as_such(archive: str, ray_cluster: None) -> None:
    parts = plan(open_manifest(archive).table, GOOD + BAD)
    with pytest.raises(UserError) as mistake:
        list(map_parts(parts, Counter, ("part-00000",)))
    assert str(mistake.value) == "the bucket is gone: make it again"


def test_other_errors_on_a_worker_keep_their_type(archive: str, ray_cluster: None) -> None:
    def work(part: Part) -> dict[str, object]:
        raise ZeroDivisionError("a bug")

    parts = plan(open_manifest(archive).table, GOOD + BAD)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(map_parts(parts, lambda: work))
