"""Raw archives as datasets of the same rows as shards, and work on parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from ray.data import Dataset

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode import make_rows
from cxr.data.ingest import ingest
from cxr.data.ledger import Part, plan
from cxr.data.manifest_files import StoredPart, write_parts
from cxr.data.ray_data import map_parts
from cxr.data.ray_input import archive_streams, shard_streams
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.imaging.center_crop import CenterCrop
from cxr.imaging.enhance import Enhancement
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.training.fit import fit
from cxr.training.options import RunOptions
from cxr.training.run_log import read_metrics
from tests.made_shards import write_shards
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


@pytest.mark.slow
def test_streams_have_the_rows_of_shards(archive: str, shards_uri: str, tmp_path: Path) -> None:
    """The usable images of both splits, in any order."""
    streams, manifest = archive_streams(archive, str(tmp_path), PIXELS)
    info = shards.read_info(shards_uri)
    assert manifest.table.num_rows == GOOD + BAD
    assert manifest.findings == info.findings
    for split in ("train", "val"):
        rows = rows_of(streams[split].dataset(0))
        stored = pa.concat_tables([storage.read_parquet(file.uri) for file in info.parts[split]])
        checked = [schema.GATE, schema.GATE_SCORE]  # by ingest, not by streams into training
        assert rows.drop_columns(checked).equals(stored.sort_by(schema.IMAGE_ID).drop_columns(checked))
        assert schema.pixel_format(rows.schema) == PIXELS


def test_streams_have_the_chosen_columns_crops_and_enhancement(
    archive: str, ray_cluster: None, tmp_path: Path
) -> None:
    columns = [schema.IMAGE_ID, schema.SPLIT, schema.PIXELS, schema.CROP_STATUS]
    crop, enhance = CenterCrop("area"), Enhancement(equalize="clahe")
    streams, manifest = archive_streams(archive, str(tmp_path), PIXELS, columns=columns, crop=crop, enhance=enhance)
    rows = rows_of(streams["val"].dataset(0))
    assert rows.column_names == columns
    assert set(rows[schema.SPLIT].to_pylist()) == {"val"}
    val = manifest.table.filter(pc.field(schema.SPLIT) == "val")
    expected = make_rows(val, PIXELS, crop=crop.loaded(), enhance=enhance).sort_by(schema.IMAGE_ID)
    assert rows.equals(expected.filter(expected[schema.ERROR].is_null()).select(columns))


def test_a_split_without_images_is_rejected(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", good=1)
    for number in range(BAD):
        (Path(archive) / f"torn-{number}.png").unlink()
    with pytest.raises(UserError, match=r"has no image in its (train|val) split"):
        archive_streams(archive, str(tmp_path / "out"), PIXELS)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> shards.ShardInfo:
    """40 images in row groups of 2."""
    folder = tmp_path_factory.mktemp("numbered")
    return shards.read_info(write_shards(folder, {"train": 40, "val": 3}, size=32, row_group_rows=2))


def passes(info: shards.ShardInfo, seed: int, count: int, world: int) -> list[list[list[str]]]:
    """The images that each worker is given in some passes over train."""
    dataset = shard_streams(info, [schema.IMAGE_ID])["train"].dataset(seed)
    dataset.context.execution_options.preserve_order = True
    shares = dataset.streaming_split(world, equal=True)

    def names(share: Any) -> list[str]:
        batches = cast("Iterator[pa.Table]", share.iter_batches(batch_format="pyarrow"))
        return [name for batch in batches for name in batch[schema.IMAGE_ID].to_pylist()]

    reading = ray.remote(num_cpus=0)(lambda share: [names(share) for _ in range(count)])
    return ray.get([reading.remote(share) for share in shares])


@pytest.mark.slow
def test_ray_reads_shards_in_the_same_order_in_every_run(ray_cluster: None, numbered: shards.ShardInfo) -> None:
    first = passes(numbered, 0, 2, world=2)
    assert passes(numbered, 0, 2, world=2) == first
    for number in range(2):
        assert len({name for share in first for name in share[number]}) == 40
    assert first[0][0] != first[0][1], "each pass has an order of its own"
    assert passes(numbered, 1, 1, world=2)[0][0] != first[0][0]


@pytest.mark.slow
def test_training_through_ray_data_is_repeatable(
    ray_cluster: None, numbered: shards.ShardInfo, tmp_path: Path
) -> None:
    """Two runs have the same losses, and so have two runs that were stopped after an epoch and resumed."""
    recipe = AlignRecipe(size=32, batch_size=8, backbone="conv3", lungs=False)

    def losses(out: Path, *stops: int) -> list[float]:
        for number, epochs in enumerate(stops):
            longer, run = recipe.replace(epochs=epochs), RunOptions(shard_reader="ray")
            fit(longer, numbered.uri, str(out), run, resume=number > 0, in_process=True)
        return [row["train/loss"] for row in read_metrics(str(out))]

    assert losses(tmp_path / "a", 2) == losses(tmp_path / "b", 2)
    assert losses(tmp_path / "c", 1, 2) == losses(tmp_path / "d", 1, 2)


class Counter:
    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __call__(self, part: Part) -> dict[str, object]:
        if part.name == self.wrong:
            raise UserError("the bucket is gone: make it again")
        return {"name": part.name, "rows": part.rows.num_rows, "worker": os.getpid()}


def stored_parts(archive: str, folder: Path, rows: int) -> list[StoredPart]:
    return write_parts(str(folder / "plan"), plan(open_manifest(archive).table, rows))


def test_each_part_is_processed_once(archive: str, ray_cluster: None, tmp_path: Path) -> None:
    parts = stored_parts(archive, tmp_path, 5)
    summaries = list(map_parts(parts, Counter, ("",)))
    assert sorted((s["name"], s["rows"]) for s in summaries) == [(p.name, p.group.rows) for p in parts]
    assert os.getpid() not in {s["worker"] for s in summaries}


@pytest.mark.slow
def test_a_user_error_on_a_worker_is_raised_as_such(archive: str, ray_cluster: None, tmp_path: Path) -> None:
    parts = stored_parts(archive, tmp_path, GOOD + BAD)
    with pytest.raises(UserError) as mistake:
        list(map_parts(parts, Counter, ("part-00000",)))
    assert str(mistake.value) == "the bucket is gone: make it again"


def test_other_errors_on_a_worker_keep_their_type(archive: str, ray_cluster: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, object]:
        raise ZeroDivisionError("a bug")

    parts = stored_parts(archive, tmp_path, GOOD + BAD)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(map_parts(parts, lambda: work))
