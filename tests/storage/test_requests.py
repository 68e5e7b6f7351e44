"""How many requests reading takes, and how little a distant store slows it down."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cxr import schema, storage
from cxr.benchmarks.throughput.archive import make_pictures
from cxr.data import decode, shard_loader, shards
from cxr.data.shard_loader import ShardStream
from cxr.imaging.decode import check_head
from cxr.schema import PixelFormat
from tests.data.test_decode import manifest
from tests.made_containers import saved, tarred, zipped
from tests.made_shards import write_shards
from tests.servers import faulty, slow
from tests.servers.slow import SlowS3

IMAGES = 192


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[SlowS3], SlowS3]:
    """Makes S3 clients use a server."""

    def use(server: SlowS3) -> SlowS3:
        for name, value in faulty.variables(server.url).items():
            monkeypatch.setenv(name, value)
        return server

    return use


@pytest.fixture
def server(tmp_path: Path, connect: Callable[[SlowS3], SlowS3]) -> Iterator[SlowS3]:
    """A server of `tmp_path` that answers at once."""
    with slow.serve(tmp_path, 0, 1e12) as started:
        yield connect(started)


def requests(server: SlowS3, read: Callable[[], object]) -> int:
    before = server.requests()
    read()
    return server.requests() - before


def test_a_whole_object_is_read_by_one_request(server: SlowS3, tmp_path: Path) -> None:
    png = random.Random(0).randbytes(500_000)
    dicom = bytes(128) + b"DICM" + random.Random(1).randbytes(15 << 20)
    saved(tmp_path / "a.png", png)
    saved(tmp_path / "a.dcm", dicom)
    assert requests(server, lambda: storage.read_bytes("s3://xrays/a.png")) == 1
    assert requests(server, lambda: storage.read_bytes("s3://xrays/a.dcm", check=lambda head, size: None)) == 1
    assert requests(server, lambda: storage.read_start("s3://xrays/a.dcm", 4096)) == 1
    assert storage.read_bytes("s3://xrays/a.dcm", check=check_head) == dicom


@pytest.mark.parametrize(("pack", "suffix", "index"), [(zipped, "zip", 1), (tarred, "tar", None)])
def test_a_member_of_a_container_is_read_by_one_request(
    server: SlowS3, tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], suffix: str, index: int | None
) -> None:
    files = {f"{number}.png": random.Random(number).randbytes(300_000) for number in range(8)}
    saved(tmp_path / f"a.{suffix}", pack(files))
    listed = requests(server, lambda: list(storage.list_files(f"s3://xrays/a.{suffix}!")))
    assert listed == index or index is None
    for name, data in files.items():
        read: list[bytes] = []
        uri = f"s3://xrays/a.{suffix}!/{name}"
        assert requests(server, lambda uri=uri, read=read: read.append(storage.read_bytes(uri))) == 1
        assert read == [data]


def epoch(uri: str) -> list[list[int]]:
    """The numbers of the images in each batch."""
    info = shards.read_info(uri)
    stream = ShardStream(info, "train", (schema.PIXELS, schema.LABELS), batch_size=8, cache_bytes=0)
    return [batch[schema.PIXELS][:, 0, 0].tolist() for batch in stream.train(0)]


def test_a_row_group_is_read_by_one_request_and_a_footer_by_another(server: SlowS3, tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": 96}, row_group_rows=8, part_rows=48)
    reader, uri = storage.RowGroupReader(), f"s3://xrays/{next(tmp_path.glob('train/*')).relative_to(tmp_path)}"
    for group in range(6):
        read = requests(server, lambda group=group: reader.read(uri, group, [schema.PIXELS, schema.LABELS]))
        assert read == (1 if group else 2)
    assert epoch("s3://xrays") == epoch(str(tmp_path))


@pytest.mark.slow
def test_training_does_not_wait_for_each_row_group(
    tmp_path: Path,
    connect: Callable[[SlowS3], SlowS3],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """25 ms a request and 80 MB/s a stream: one row group at a time gave 550 images/s of 256 px."""
    write_shards(tmp_path, {"train": 4096}, size=256, row_group_rows=128, part_rows=512)
    paces, batches = [], []
    with slow.serve(tmp_path) as started:
        connect(started)
        for ahead in (2, 16):
            monkeypatch.setattr(shard_loader, "_AHEAD", ahead)
            begun = time.perf_counter()
            batches.append(epoch("s3://xrays"))
            paces.append(4096 / (time.perf_counter() - begun))
    with capsys.disabled():
        print(
            f"\nimages of 256 px from shards in a distant store: {paces[0]:.0f}/s with 2 row groups ahead, ", end=""
        )
        print(f"{paces[1]:.0f}/s with 16")
    assert batches[0] == batches[1]
    assert paces[1] > 1.5 * paces[0]


@pytest.mark.slow
def test_decoders_do_not_wait_for_a_distant_store(
    tmp_path: Path,
    connect: Callable[[SlowS3], SlowS3],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """100 ms a request and 80 MB/s a stream: four fetching threads cannot give more than 38 images/s."""
    names = [path.name for path in make_pictures(tmp_path, 24, 1024)] * (IMAGES // 24)
    paces: dict[tuple[str, int], list[float]] = {}
    with slow.serve(tmp_path, latency_s=0.1) as started:
        connect(started)
        for folder, fetched in [
            (str(tmp_path), 16),
            *(3 * [(str(tmp_path), 16), ("s3://xrays", 4), ("s3://xrays", 16)]),
        ]:
            monkeypatch.setattr(decode, "_FETCHED", fetched)
            begun = time.perf_counter()
            rows = decode.make_rows(manifest([f"{folder}/{name}" for name in names]), PixelFormat(256))
            assert rows[schema.ERROR].null_count == IMAGES
            paces.setdefault((folder, fetched), []).append(IMAGES / (time.perf_counter() - begun))
        assert started.requests() == 6 * IMAGES
    local, few, many = (max(values) for values in paces.values())
    with capsys.disabled():
        print(
            f"\nPNGs decoded: {local:.0f}/s from a local disk, from a distant store {few:.0f}/s with 4 and ", end=""
        )
        print(f"{many:.0f}/s with 16 fetched at a time")
    assert many > 1.15 * few
