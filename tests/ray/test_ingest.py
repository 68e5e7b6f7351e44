"""Ingest on a cluster: every image exactly once, also after interruptions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode import make_rows
from cxr.data.ingest import IngestResult, ingest
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from tests.ray.archives import BAD, GOOD, write_archive

pytestmark = pytest.mark.ray
PIXELS = PixelFormat(size=32)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_archive(tmp_path_factory.mktemp("ingest") / "archive")


@pytest.fixture(scope="module")
def ingested(archive: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> IngestResult:
    out = tmp_path_factory.mktemp("ingest") / "shards"
    return ingest(archive, str(out), pixels=PIXELS, max_rejects=0.1)


def all_rows(out: str) -> pa.Table:
    info = shards.read_info(out)
    files = [part.uri for parts in info.parts.values() for part in parts]
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files]).sort_by(schema.IMAGE_ID)


def test_shards_contain_the_decoded_images(archive: str, ingested: IngestResult) -> None:
    rows = make_rows(open_manifest(archive).table.sort_by(schema.IMAGE_ID), PIXELS, check="warn")
    good = rows.slice(0, GOOD)
    stored, score = all_rows(ingested.shards), [schema.GATE_SCORE]
    assert stored.select(good.column_names).drop_columns(score).equals(good.drop_columns(score))
    # Sums of floats depend on how many images are checked at once.
    np.testing.assert_allclose(stored[schema.GATE_SCORE].to_numpy(), good[schema.GATE_SCORE].to_numpy(), atol=1e-5)
    assert sum(ingested.counts.values()) == GOOD


def test_rejects_are_listed_with_their_reasons(archive: str, ingested: IngestResult) -> None:
    rejects = pq.read_table(f"{ingested.shards}/rejects.parquet")
    assert rejects.schema.equals(schema.REJECTS)
    assert sorted(rejects[schema.IMAGE_ID].to_pylist()) == [f"torn-{i}.png" for i in range(BAD)]
    assert all("truncated" in reason for reason in rejects[schema.ERROR].to_pylist())
    assert sum(ingested.reasons.values()) == ingested.rejects == BAD


def test_archive_file_lists_every_part(ingested: IngestResult) -> None:
    info = shards.read_info(ingested.shards)
    assert info.pixels == PIXELS
    assert {split: info.rows(split) for split in info.parts} == ingested.counts
    for split, parts in info.parts.items():
        for part in parts:
            table = pq.ParquetFile(part.uri).read()
            assert table.num_rows == part.rows
            assert set(table[schema.SPLIT].to_pylist()) <= {split}
            assert schema.pixel_format(table.schema) == PIXELS


def test_a_stopped_ingest_resumes_with_the_missing_parts(archive: str, ingested: IngestResult) -> None:
    before = all_rows(ingested.shards)
    first, *kept = sorted(Path(ingested.shards).glob("*/part-*.parquet"))
    times = [path.stat().st_mtime_ns for path in kept]
    first.unlink()
    (Path(ingested.shards) / "archive.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        shards.read_info(ingested.shards)
    again = ingest(archive, ingested.shards, pixels=PIXELS, max_rejects=0.1)
    assert all_rows(again.shards).equals(before)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert dataclasses.replace(again, seconds=0, images_per_second=0) == dataclasses.replace(
        ingested, seconds=0, images_per_second=0
    )


def test_a_finished_ingest_has_nothing_left_to_do(archive: str, ingested: IngestResult) -> None:
    again = ingest(archive, ingested.shards, pixels=PIXELS, max_rejects=0.1)
    assert again.images_per_second == 0
    assert again.counts == ingested.counts


def test_another_pixel_format_needs_another_out(archive: str, ingested: IngestResult) -> None:
    with pytest.raises(UserError, match="another --out"):
        ingest(archive, ingested.shards, pixels=PixelFormat(size=64), max_rejects=0.1)


def test_a_foreign_part_is_rejected(archive: str, ingested: IngestResult, tmp_path: Path) -> None:
    part = next(Path(ingested.shards).glob("*/part-*.parquet"))
    whole = part.read_bytes()
    pq.write_table(pa.table({"a": [1]}), part)
    try:
        with pytest.raises(UserError, match="delete it"):
            ingest(archive, ingested.shards, pixels=PIXELS, max_rejects=0.1)
    finally:
        part.write_bytes(whole)


def test_too_many_rejects_fail_the_ingest_after_it_is_written(archive: str, ingested: IngestResult) -> None:
    with pytest.raises(UserError, match=r"3 of 43 images.*3 x truncated"):
        ingest(archive, ingested.shards, pixels=PIXELS, max_rejects=0.05)
    assert storage.exists(f"{ingested.shards}/archive.json")


@pytest.mark.slow
def test_a_zip_file_gives_the_same_shards(archive: str, ingested: IngestResult, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", archive)
    result = ingest(packed, str(tmp_path / "shards"), pixels=PIXELS, max_rejects=0.1)
    assert (result.counts, result.reasons) == (ingested.counts, ingested.reasons)
    rows, expected = all_rows(result.shards), all_rows(ingested.shards)
    names = [name for name in expected.column_names if name != schema.SOURCE_URI]
    assert rows.select(names).equals(expected.select(names))
    assert all(uri.startswith(f"{packed}!/") for uri in rows[schema.SOURCE_URI].to_pylist())
