"""How many requests reading takes, and how little a distant store slows it down."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cxr import schema, storage
from cxr.benchmarks.throughput.archive import make_pictures
from cxr.data.decode import make_rows
from cxr.imaging.decode import check_head
from cxr.schema import PixelFormat
from tests.data.test_decode import manifest
from tests.made_containers import saved, tarred, zipped
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


@pytest.mark.slow
def test_decoders_do_not_wait_for_a_distant_store(
    tmp_path: Path, connect: Callable[[SlowS3], SlowS3], capsys: pytest.CaptureFixture[str]
) -> None:
    """25 ms a request and 80 MB/s a stream: four fetching threads gave half of the local throughput."""
    names = [path.name for path in make_pictures(tmp_path, 24, 1024)] * (IMAGES // 24)
    paces: dict[str, list[float]] = {str(tmp_path): [], "s3://xrays": []}
    with slow.serve(tmp_path) as started:
        connect(started)
        for folder in [str(tmp_path), *(3 * [*paces])]:
            begun = time.perf_counter()
            rows = make_rows(manifest([f"{folder}/{name}" for name in names]), PixelFormat(256))
            assert rows[schema.ERROR].null_count == IMAGES
            paces[folder].append(IMAGES / (time.perf_counter() - begun))
        assert started.requests() == 3 * IMAGES
    local, remote = max(paces[str(tmp_path)]), max(paces["s3://xrays"])
    with capsys.disabled():
        print(f"\nPNGs decoded: {local:.0f}/s from a local disk, {remote:.0f}/s from a distant store")
    assert remote > 0.7 * local
