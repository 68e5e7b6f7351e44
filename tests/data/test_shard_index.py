"""The index of shards: what reads it reads one file, also for combined shards, and gets what the shards contain."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.data import ingest, ledger, shard_index, shards
from cxr.data.ingest import PartWriter
from cxr.data.ledger import Part
from cxr.data.manifest_files import write_parts
from cxr.data.sampling import Fold, load_selections, rows_of, showing, store_selections
from cxr.data.shard_index import find_rows, image_ids, read_index, read_labels, write_index
from cxr.errors import UserError
from cxr.schema import PixelFormat
from tests.data.large_index import measured
from tests.data.test_shard_writer import part_of
from tests.made_shards import write_shards
from tests.peak_memory import peak_mib
from tests.servers import faulty, slow


def known(split: str, number: int) -> Mapping[str, object]:
    return {
        schema.LABELS: None if number % 4 == 3 else [number % 3 - 1, number % 2],
        schema.PATIENT_ID: None if number % 5 == 4 else f"{split} {number // 3}",
    }


@pytest.fixture
def made(tmp_path: Path) -> shards.ShardInfo:
    """Two sets of shards whose findings have different orders."""
    members = [
        write_shards(tmp_path / "a", {"train": 30, "val": 9}, known=known, findings=("Mass", "Edema")),
        write_shards(tmp_path / "b", {"train": 25, "test": 3}, known=known, findings=("Hernia", "Mass")),
    ]
    return shards.join_shards(str(tmp_path / "all"), members, ["/a", "/b"])


def stored(info: shards.ShardInfo, split: str) -> pa.Table:
    names = [schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.LABELS]
    return pa.concat_tables(shards.read_rows(file, names, info.findings) for file in info.parts[split])


def test_labels_and_patients_are_those_of_the_shard_files(made: shards.ShardInfo, monkeypatch) -> None:
    for rows_together in (1 << 16, 7):
        monkeypatch.setattr(shard_index, "_GROUP_ROWS", rows_together)
        for member in made.indexes:
            about = shards.read_info(member.shards)
            files = [(file, Path(file.uri)) for split in about.parts.values() for file in split]
            tables = ((f"{path.parent.name}/{path.name}", storage.read_parquet(file.uri)) for file, path in files)
            write_index(member.shards, tables)
        splits, findings = ("val", "train", "test"), ("Hernia", "Edema", "Mass")
        labels, patients = read_labels(made, splits, findings, patients=True)
        tables = [stored(made, split) for split in splits]
        assert patients.to_pylist() == [id for table in tables for id in schema.patients_of(table).to_pylist()]
        order = [made.findings.index(finding) for finding in findings]
        rows = [row or [schema.UNKNOWN] * 3 for table in tables for row in table[schema.LABELS].to_pylist()]
        np.testing.assert_array_equal(labels, np.array(rows)[:, order])
    assert len(list(read_index(made, [schema.IMAGE_ID]))) > 4  # several row groups


def test_each_image_is_found_in_its_file(made: shards.ShardInfo) -> None:
    for member in map(shards.read_info, (index.shards for index in made.indexes)):
        expected = {
            name: (file.uri, row)
            for split in member.parts.values()
            for file in split
            for row, name in enumerate(storage.read_parquet(file.uri)[schema.IMAGE_ID].to_pylist())
        }
        assert find_rows(member, expected) == expected
        name, *_ = expected
        assert find_rows(member, [name, "none"]) == {name: expected[name]}
    assert find_rows(made, ["test-0002.png"])["test-0002.png"][0].startswith(made.indexes[1].shards)


def test_folds_and_sampling_read_only_the_index(made: shards.ShardInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = storage.RowGroupReader.read

    def recorded(self: storage.RowGroupReader, uri: str, *args) -> pa.Table:
        opened.append(Path(uri).name)
        return read(self, uri, *args)

    monkeypatch.setattr(storage.RowGroupReader, "read", recorded)
    monkeypatch.setattr(storage, "read_parquet", None)
    folds = [rows_of(made, "val", Fold(number, 4)) for number in range(4)]
    assert sorted(np.concatenate([fold.numbers_N for fold in folds]).tolist()) == list(range(64))
    assert len(opened) == 2  # once for all folds of the same `info`
    assert showing(made, "val", ["Mass"], Fold(1, 4)).shape == (len(folds[1]),)
    assert set(opened) == {shards.INDEX_FILE}


def test_ingest_indexes_the_good_images(tmp_path: Path) -> None:
    pixels, part = PixelFormat(32), part_of(tmp_path, 12)
    empty = Part("val/part-00000", part.rows.slice(4, 1))
    book = ledger.open_ledger(str(tmp_path / "shards"), {}, "")
    for each in (part, empty):
        PartWriter(book, pixels)(each)
    stored = write_parts(str(tmp_path / "plan"), [part, empty])
    write_index(book.uri, ((each.path, ingest._read_back(book, each)[1]) for each in stored))
    index = storage.read_parquet(storage.join(book.uri, shards.INDEX_FILE))
    table = storage.read_parquet(book.file(part))
    for name in shard_index.IMAGE_COLUMNS:
        assert index[name].to_pylist() == table[name].to_pylist()
    assert index[shard_index.ROW].to_pylist() == [*range(10)]
    assert set(index[shard_index.PART].to_pylist()) == {part.path}


def test_the_archive_with_repeated_ids_is_named(made: shards.ShardInfo) -> None:
    assert sum(map(len, image_ids(made))) == 67
    with pytest.raises(UserError, match=r"the archives combined in .*all, got 25 ids in common, for example 'train-"):
        shard_index.check_ids(made)


@pytest.mark.slow
def test_a_million_images_take_a_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folds of a million images in 1,000 files, from a store with 25 ms a request."""
    findings, per_file = schema.FINDINGS, 1000
    rng = np.random.default_rng(0)

    def part(number: int) -> pa.Table:
        labels = (rng.random((per_file, len(findings))) < 0.04).astype(np.int8)
        ids = [f"{number * per_file + row:08d}_000.png" for row in range(per_file)]
        ends = pa.array(np.arange(per_file + 1, dtype=np.int32) * len(findings))
        columns = {
            schema.IMAGE_ID: pa.array(ids),
            schema.PATIENT_ID: pa.array([f"{(number * per_file + row) // 4:07d}" for row in range(per_file)]),
            schema.SPLIT: pa.array(["train"] * per_file),
            schema.LABELS: pa.ListArray.from_arrays(ends, pa.array(labels.reshape(-1))),
        }
        return pa.table(columns)

    paths = [f"train/part-{number:05d}.parquet" for number in range(1000)]
    write_index(str(tmp_path), ((path, part(number)) for number, path in enumerate(paths)))
    about = {"kind": shards.KIND, "version": 1, "source": "made", "archive": "", "findings": list(findings)}
    about |= {"pixels": {"size": 256, "bits": 8}, "row_group_rows": 128, "rejects": 0}
    listed = {"train": [{"path": path, "rows": per_file} for path in paths]}
    storage.write_json(str(tmp_path / shards.ARCHIVE_FILE), about | {"parts": listed})
    with slow.serve(tmp_path) as server:
        for name, value in faulty.variables(server.url).items():
            monkeypatch.setenv(name, value)
        info, before, begun = shards.read_info("s3://xrays"), server.requests(), time.perf_counter()
        labels, patients = read_labels(info, ("train",), findings, patients=True)
        seconds, requests = time.perf_counter() - begun, server.requests() - before
        assert len(rows_of(info, "train", Fold(0, 5))) > 700_000
        store_selections(info, str(tmp_path / "selections.npz"))
        worker, before, begun = shards.read_info("s3://xrays"), server.requests(), time.perf_counter()
        load_selections(worker, "s3://xrays/selections.npz")
        rows_of(worker, "train", Fold(0, 5))
        of_worker = server.requests() - before, time.perf_counter() - begun
    with capsys.disabled():
        size = (tmp_path / shards.INDEX_FILE).stat().st_size / 1e6
        print(
            f"\nlabels and patients of a million images: {requests} requests, {seconds:.1f} s, index {size:.0f} MB, "
        )
        print(f"peak memory of all tests so far {peak_mib():.0f} MiB")
        stored = (tmp_path / "selections.npz").stat().st_size / 1e6
        print(f"folds on a worker: {of_worker[0]} requests, {of_worker[1]:.1f} s, {stored:.2f} MB")
    assert (labels.shape, len(patients)) == ((1_000_000, 14), 1_000_000)
    assert requests < 30
    assert of_worker[0] <= 2


@pytest.mark.slow
def test_folds_and_sampling_of_a_million_images_take_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, worker = measured(tmp_path, 1_000_000)
    with capsys.disabled():
        print(f"\nfolds and sampling: by the driver {driver}, by a worker {worker}")
    assert driver["peak_gib"] < 1
    assert worker["peak_gib"] < driver["peak_gib"]
    assert worker["folds_s"] < driver["folds_s"] / 4
