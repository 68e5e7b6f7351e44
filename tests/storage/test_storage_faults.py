"""Storage behind a server that fails on demand, and on disks that fill up or disappear."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from pyarrow import fs

from cxr import schema, storage
from cxr.data.decode import make_rows
from cxr.data.decode_pool import DecodePool, DecoderUnavailableError
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.storage import NotFoundError, StorageError, UnreadableError
from cxr.storage.errors import storage_error
from cxr.storage.files import atomic_writer
from tests.ray.archives import write_archive
from tests.servers import faulty
from tests.servers.faulty import Faulty


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    with faulty.moto() as backend, faulty.before(backend) as front:
        yield front


@pytest.fixture
def front(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """A server without faults, with an empty bucket `xrays`; tests switch faults on."""
    for name, value in faulty.variables(server.url).items():
        monkeypatch.setenv(name, value)
    server.one_in, server.refused = 0, {}
    server.throttle(0)
    bucket = boto3.resource("s3").Bucket("xrays")
    bucket.create()
    bucket.objects.delete()
    server.counts.clear()
    return server


# ---- Transient errors


def test_transfers_survive_errors_resets_and_truncated_responses(front: Faulty, tmp_path: Path) -> None:
    """40 files, some uploaded in parts: every byte arrives although one request in five fails."""
    rng = os.urandom(40 << 20)
    for number in range(40):
        size = len(rng) if number == 0 else 1000 * number
        (tmp_path / f"{number}.bin").write_bytes(rng[:size])
    front.one_in = 5
    storage.upload_folder(tmp_path, "s3://xrays/up")
    storage.download_folder("s3://xrays/up", tmp_path / "down")
    for path in tmp_path.glob("*.bin"):
        assert (tmp_path / "down" / path.name).read_bytes() == path.read_bytes()
    assert min(front.counts.get(kind, 0) for kind in faulty.PASSING) > 3


@pytest.mark.slow
def test_ray_filesystem_retries_after_pickling(front: Faulty, tmp_path: Path) -> None:
    storage_path, files = storage.ray_storage("s3://xrays/run")
    files = pickle.loads(pickle.dumps(files))
    assert storage_path == "xrays/run"
    (tmp_path / "epoch").mkdir()
    (tmp_path / "back").mkdir()
    (tmp_path / "epoch" / "weights.pt").write_bytes(b"w" * 100_000)
    front.one_in = 3
    for _ in range(5):
        fs.copy_files(str(tmp_path / "epoch"), "xrays/run/epoch", destination_filesystem=files)
        fs.copy_files("xrays/run/epoch", str(tmp_path / "back"), source_filesystem=files)
        assert (tmp_path / "back" / "weights.pt").read_bytes() == b"w" * 100_000
        assert [i.base_name for i in files.get_file_info(fs.FileSelector("xrays/run/epoch"))] == ["weights.pt"]
    front.throttle(3)
    with files.open_output_stream("xrays/run/snapshot.json") as stream:
        stream.write(b"{}")
    assert files.open_input_stream("xrays/run/snapshot.json").read() == b"{}"
    assert front.counts["SlowDown"] >= 3
    files.delete_dir("xrays/run/epoch")
    assert files.get_file_info("xrays/run/epoch").type == fs.FileType.NotFound
    with pytest.raises(FileNotFoundError):
        files.open_input_stream("xrays/run/none")


def test_a_network_share_that_returns_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, error_numbers = str(tmp_path / "a.txt"), [errno.ESTALE, errno.ENOTCONN]
    storage.write_text(uri, "a")
    monkeypatch.setattr(
        "cxr.storage.ranges.open", lambda *_: raise_next(error_numbers) or io.BytesIO(b"a"), raising=False
    )
    assert storage.read_text(uri) == "a"
    assert error_numbers == []


def raise_next(error_numbers: list[int]) -> None:
    if error_numbers:
        number = error_numbers.pop()
        raise OSError(number, os.strerror(number))


# ---- Permanent errors


def test_a_failed_multipart_upload_leaves_the_old_object(front: Faulty, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "0")
    storage.write_text("s3://xrays/a.bin", "old")
    front.refused = {"partNumber=2": "AccessDenied"}
    with pytest.raises(StorageError, match="403"):
        storage.write_bytes("s3://xrays/a.bin", bytes(40 << 20))
    assert storage.read_text("s3://xrays/a.bin") == "old"
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="xrays")


def test_an_object_that_is_not_finished_does_not_appear(front: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(size: int) -> None:
        with atomic_writer("s3://xrays/a.bin") as stream:
            stream.write(bytes(size))
            raise ZeroDivisionError

    def uploads() -> int:  # an answer that was lost may have left one
        return len(boto3.client("s3").list_multipart_uploads(Bucket="xrays").get("Uploads", ()))

    storage.write_text("s3://xrays/a.bin", "old")
    before = uploads()
    for size in (5, 40 << 20):
        with pytest.raises(ZeroDivisionError):
            write(size)
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "0")
    front.refused = {"partNumber=2": "AccessDenied"}
    with pytest.raises(StorageError, match="403"), atomic_writer("s3://xrays/a.bin") as stream:
        stream.write(bytes(40 << 20))
    front.refused = {}
    assert storage.read_text("s3://xrays/a.bin") == "old"
    assert uploads() == before


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_wrong_credentials_are_reported_by_every_operation(front: Faulty, code: str) -> None:
    front.refused = {"": code}
    for operation in (
        storage.read_bytes,
        storage.check_writable,
        storage.exists,
        lambda uri: list(storage.list_files(uri)),
    ):
        with pytest.raises(StorageError, match="rejected the credentials: check AWS_ACCESS_KEY_ID") as caught:
            operation("s3://xrays/a.png")
        assert type(caught.value) is StorageError


def test_a_denied_object_is_a_row_and_a_denied_bucket_stops(front: Faulty, tmp_path: Path) -> None:
    storage.upload_folder(Path(write_archive(tmp_path / "archive", good=6)), "s3://xrays/nih")
    manifest = open_manifest("s3://xrays/nih").table
    front.refused = {"/xrays/nih/image-002.png": "AccessDenied"}
    rows = make_rows(manifest, PixelFormat(32)).to_pylist()
    errors = {row[schema.IMAGE_ID]: row[schema.ERROR] for row in rows if "image" in row[schema.IMAGE_ID]}
    assert [name for name, error in errors.items() if error] == ["image-002.png"]
    assert "file not readable" in errors["image-002.png"]
    for forbidden in ("/xrays/nih/", "nih"):  # its objects; then the listing too
        front.refused = {forbidden: "AccessDenied"}
        with pytest.raises(StorageError, match=r"denied access \(403\): check AWS_ACCESS_KEY_ID"):
            make_rows(manifest, PixelFormat(32))


def test_an_object_in_an_archive_class_is_unreadable(front: Faulty) -> None:
    storage.write_text("s3://xrays/cold.png", "x")
    front.refused = {"cold.png": "InvalidObjectState"}
    error = OSError("AWS Error UNKNOWN (HTTP status 403): Unable to parse ExceptionName: InvalidObjectState")
    assert isinstance(storage_error("s3://xrays/cold.png", error), UnreadableError)


def test_a_missing_bucket_is_not_a_missing_file(front: Faulty) -> None:
    for operation in (storage.read_bytes, storage.check_writable):
        with pytest.raises(StorageError, match="there is no bucket 'nowhere'") as caught:
            operation("s3://nowhere/a.png")
        assert not isinstance(caught.value, NotFoundError)


def test_an_object_is_uploaded_while_it_is_written(front: Faulty) -> None:
    blocks = [bytes([number]) * (5 << 20) for number in range(8)]
    front.one_in = 3
    with atomic_writer("s3://xrays/a.bin") as stream:
        for number, block in enumerate(blocks):
            assert stream.write(block) == len(block)
            if number == 5:
                assert any("partNumber=1" in seen.path for seen in front.seen)
                assert not storage.exists("s3://xrays/a.bin")
    front.one_in = 0
    assert storage.read_bytes("s3://xrays/a.bin") == b"".join(blocks)
    with atomic_writer("s3://xrays/small.bin") as stream:
        stream.write(b"small")
    assert storage.read_bytes("s3://xrays/small.bin") == b"small"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ENOMEM, errno.EMFILE])
def test_a_failing_disk_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    manifest = open_manifest(write_archive(tmp_path / "archive", good=2)).table
    monkeypatch.setattr("cxr.storage.ranges.open", lambda *_: raise_next([number]), raising=False)
    with pytest.raises(StorageError, match="check the disk and whether the network share is mounted"):
        make_rows(manifest, PixelFormat(32))


def test_out_of_memory_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_manifest(write_archive(tmp_path / "archive", good=2)).table

    def greedy(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cxr.data.decode.geometry.fitted_transform", greedy)
    with pytest.raises(MemoryError):
        make_rows(manifest, PixelFormat(32))


def test_decoders_that_cannot_start_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_manifest(write_archive(tmp_path / "archive", good=2)).table
    monkeypatch.setattr("cxr.data.decode_pool._shared", DecodePool)
    monkeypatch.setattr("cxr.data.decode_pool.sys.executable", "/bin/false")
    with pytest.raises(DecoderUnavailableError, match="exited with code 1"):
        make_rows(manifest, PixelFormat(32))


FILL = """
import resource, sys
from pyarrow import fs
from cxr import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
def write_through_ray(uri, data):
    with storage.ray_storage(uri)[1].open_output_stream(uri) as stream:
        stream.write(data)
for write in (storage.write_bytes, write_through_ray):
    try:
        write(sys.argv[1], bytes(100_000))
    except Exception as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path / "a.bin")], capture_output=True, text=True)
    assert done.stdout.count("File too large") == 2, done.stdout + done.stderr
    assert "free some space or choose another folder" in done.stdout
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_check_writable_leaves_no_files(front: Faulty, tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "a" / "b"))
    storage.check_writable("s3://xrays/a/b")
    assert list(tmp_path.iterdir()) == []
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket="xrays")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder, got the file"):
        storage.check_writable(str(tmp_path / "file" / "out"))


def test_messages_show_no_password_and_no_signature() -> None:
    text = str(StorageError('s3://key:word@b/x.png: "http://u:p@host/b?X-Amz-Signature=abc&list-type=2" failed'))
    assert text == 's3://b/x.png: "http://host/b" failed'
    assert str(pickle.loads(pickle.dumps(StorageError(text)))) == text
