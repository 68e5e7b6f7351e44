"""Members of ZIP and TAR files are listed and read like files of a folder, without unpacking the container."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from cxr import storage
from cxr.storage import NotFoundError, StorageError, UnreadableError, containers, gzip_random_access
from tests.made_containers import SUFFIXES, container, saved, tarred, zipped
from tests.servers import faulty
from tests.servers.faulty import Faulty

RNG = random.Random(0)
FILES = {
    f"images/{number:02d}.dcm": RNG.randbytes(RNG.choice([1, 700, 40_000])) + bytes(RNG.choice([0, 90_000]))
    for number in range(20)
} | {"labels.csv": b"image,finding\n", "images/deep/er/x.png": b"x", "images/empty.png": b""}


@pytest.fixture(params=SUFFIXES)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return saved(tmp_path / f"archive.{request.param}", container(FILES, request.param))


def contents(uri: str) -> dict[str, bytes]:
    return {entry.path: storage.read_bytes(entry.uri) for entry in storage.list_files(uri)}


# ---- Addresses


def test_addresses_of_members_are_joined_and_shortened_like_paths() -> None:
    member = storage.join("s3://b/a.zip!", "images", "1.dcm")
    assert member == "s3://b/a.zip!/images/1.dcm" == storage.normalize(member)
    assert storage.name(member) == "1.dcm"
    assert storage.split_member(member) == ("s3://b/a.zip", "images/1.dcm")
    assert storage.split_member("/x/a.TAR.GZ!") == ("/x/a.TAR.GZ", "")
    assert not storage.is_local(member)
    assert storage.is_local("/x/a.zip!/1.dcm")
    for other in ("/x/a.zip", "/x/a!/b", "/x/a.zip!b/c", "s3://b/a.png!/x"):
        assert storage.split_member(other) is None


def test_a_folder_named_like_a_member_is_skipped_and_counted(tmp_path: Path) -> None:
    saved(tmp_path / "a.zip!" / "1.dcm", b"not in a container")
    saved(tmp_path / "a.zip", zipped({"1.dcm": b"in a container"}))
    special = Counter[str]()
    assert [entry.path for entry in storage.list_files(str(tmp_path), special)] == ["a.zip"]
    assert special.total() == 1
    assert storage.read_bytes(str(tmp_path / "a.zip!/1.dcm")) == b"in a container"


def test_containers_are_never_written(tmp_path: Path) -> None:
    uri = saved(tmp_path / "a.zip", zipped({"1.dcm": b""}))
    with pytest.raises(StorageError, match="only read"):
        storage.write_bytes(f"{uri}!/2.dcm", b"")
    with pytest.raises(StorageError, match="only read"):
        storage.check_writable(f"{uri}!/out")


# ---- Reading


def test_members_are_listed_and_read_like_files(archive: str) -> None:
    root = storage.archive_root(archive)
    assert contents(root) == FILES
    assert {entry.path: entry.size for entry in storage.list_files(root)} == {
        path: len(data) for path, data in FILES.items()
    }
    assert contents(storage.join(root, "images/deep")) == {"er/x.png": b"x"}
    assert contents(storage.join(root, "labels.csv")) == {"labels.csv": b"image,finding\n"}
    assert storage.read_text(storage.join(root, "labels.csv")) == "image,finding\n"
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "images"))
    assert storage.exists(storage.join(root, "images/empty.png"))
    for missing in ("image", "images/00", "labels.csv/x"):
        assert not storage.exists(storage.join(root, missing))
        with pytest.raises(NotFoundError, match="does not exist"):
            storage.read_bytes(storage.join(root, missing))
        with pytest.raises(NotFoundError, match="does not exist"):
            list(storage.list_files(storage.join(root, missing)))
    with pytest.raises(UnreadableError, match="a container, not a file"):
        storage.read_bytes(root)


def test_members_are_read_in_any_order_by_several_threads(archive: str) -> None:
    root = storage.archive_root(archive)
    failures: list[str] = []

    def read(seed: int) -> None:
        paths = list(FILES)
        random.Random(seed).shuffle(paths)
        failures.extend(path for path in paths if storage.read_bytes(storage.join(root, path)) != FILES[path])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_compression_methods(tmp_path: Path, method: int) -> None:
    uri = saved(tmp_path / "a.zip", zipped(FILES, method))
    assert contents(f"{uri}!") == FILES


def test_zip64_data_descriptors_prefixes_and_comments(tmp_path: Path) -> None:
    class Unseekable(io.BytesIO):
        """A stream to which zipfile writes data descriptors, because it cannot correct the headers."""

        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise OSError

        def tell(self) -> int:
            raise OSError

    stream = Unseekable()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in FILES.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
        file.comment = b"x" * 60_000
    uri = saved(tmp_path / "a.zip", b"#!/bin/sh of a self-extracting file" + stream.getvalue())
    assert contents(f"{uri}!") == FILES


def test_a_packed_folder_is_the_root_of_the_archive(tmp_path: Path) -> None:
    packed = {f"nih/{path}": data for path, data in FILES.items()} | {
        "__MACOSX/nih/._labels.csv": b"",
        ".DS_Store": b"",
    }
    uri = saved(tmp_path / "a.zip", zipped(packed))
    assert storage.archive_root(uri) == f"{uri}!/nih"
    assert contents(storage.archive_root(uri)) == FILES
    assert storage.archive_root(storage.archive_root(uri)) == f"{uri}!/nih"
    assert storage.archive_root(str(tmp_path)) == str(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    assert storage.archive_root(str(tmp_path / "folder.zip")) == str(tmp_path / "folder.zip")


def test_a_container_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        uri = saved(tmp_path / f"a.{suffix}", container({"1": b"old"}, suffix))
        assert contents(f"{uri}!") == {"1": b"old"}
        saved(tmp_path / f"a.{suffix}", container({"2": b"newer"}, suffix))
        assert contents(f"{uri}!") == {"2": b"newer"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_member_keeps_its_version_when_others_are_added_and_gets_another_when_it_changes(
    tmp_path: Path, suffix: str
) -> None:
    def versions(files: dict[str, bytes], modified: dict[str, float]) -> dict[str, str]:
        uri = saved(tmp_path / f"a.{suffix}", container(files, suffix, modified))
        return {entry.path: entry.version for entry in storage.list_files(f"{uri}!")}

    before = versions({"b.png": b"1234", "c.png": b"1234"}, {"b.png": 7.25, "c.png": 8})
    after = versions({"a.png": b"5", "b.png": b"1234", "c.png": b"4321"}, {"b.png": 7.25, "c.png": 9})
    assert before["b.png"] == after["b.png"] != ""
    assert before["c.png"] != after["c.png"]


def test_indexes_of_few_containers_are_kept(tmp_path: Path) -> None:
    for number in range(40):
        uri = saved(tmp_path / f"{number}.zip", zipped({"1": b"%d" % number}))
        assert storage.read_bytes(f"{uri}!/1") == b"%d" % number
    assert len(containers._slots) == containers._CACHED


def test_names_in_other_encodings_are_spelled_out(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        file.addfile(tarfile.TarInfo("Müller.dcm"))
    uri = saved(tmp_path / "a.tar", stream.getvalue())
    assert contents(f"{uri}!") == {"M\\xfcller.dcm": b""}
    uri = saved(tmp_path / "a.zip", zipped({"Müller.dcm": b"u"}))
    assert contents(f"{uri}!") == {"Müller.dcm": b"u"}
    undecodable = str(tmp_path / "\udcff.zip")
    Path(undecodable).write_bytes(zipped({"50%.dcm": b"p"}))
    (entry,) = (entry for entry in storage.list_files(str(tmp_path)) if entry.uri.startswith("file://"))
    assert contents(f"{entry.uri}!") == {"50%.dcm": b"p"}


def test_long_names_and_extended_headers_of_tar_files(tmp_path: Path) -> None:
    files = {"/".join(["ä" * 90] * 5) + f"/{number}.dcm": bytes([number]) for number in range(3)}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as file:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        uri = saved(tmp_path / f"{form}.tar", stream.getvalue())
        assert contents(f"{uri}!") == files


# ---- gzip


def test_random_access_to_gzip_files_decompresses_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_SPACING", 1 << 16), ("_STEP", 1 << 14), ("_FED", 1 << 10), ("_BLOCK", 1 << 13)):
        monkeypatch.setattr(gzip_random_access, name, value)
    monkeypatch.setattr(gzip_random_access, "_MAX_STATES", 8)
    data = b"".join(RNG.randbytes(1000) + bytes(3000) for _ in range(500))
    # Several gzip members, as bgzip and pigz write them.
    packed = b"".join(gzip.compress(data[start : start + 300_000], mtime=0) for start in range(0, len(data), 300_000))
    file = gzip_random_access.GzipRandomAccess(saved(tmp_path / "a.gz", packed))
    for _ in range(50):
        offset, size = RNG.randrange(len(data)), RNG.randrange(100_000)
        assert file.read_at(offset, size) == data[offset : offset + size]
    assert file.read_at(len(data) + 5, 10) == b""
    assert 2 <= len(file._states) <= 8

    produced = 0
    advance = file._advance

    def counting(limit: int) -> bytes:
        nonlocal produced
        piece = advance(limit)
        produced += len(piece)
        return piece

    monkeypatch.setattr(file, "_advance", counting)
    for offset in range(0, len(data), 50_000):
        file.read_at(offset, 40_000)
    assert produced <= len(data) + file._spacing


@pytest.mark.parametrize("name", ["a.dcm.gz", "A.DICOM.GZ"])
def test_compressed_dicom_files_are_read_decompressed(tmp_path: Path, name: str) -> None:
    seen: list[tuple[bytes, int]] = []
    data = bytes(200_000) + b"end"
    uri = saved(tmp_path / name, gzip.compress(data, mtime=0))
    assert storage.read_bytes(uri, check=lambda head, size: seen.append((head, size))) == data
    assert seen == [(bytes(4096), len(data))]
    assert storage.read_bytes(saved(tmp_path / f"b{name}", b"not compressed")) == b"not compressed"
    other = gzip.compress(b"a label file", mtime=0)
    assert storage.read_bytes(saved(tmp_path / "labels.csv.gz", other)) == other
    members = gzip.compress(data[:100], mtime=0) + gzip.compress(data[100:], mtime=0)
    for number, packed in enumerate((members, gzip.compress(data, mtime=0) + bytes(512))):
        seen.clear()
        uri = saved(tmp_path / f"{number}{name}", packed)
        assert storage.read_bytes(uri, check=lambda head, size: seen.append((head, size))) == data
        assert seen == [(bytes(4096), len(data))]
        assert storage.read_start(uri, 9) == (bytes(9), len(data))
    inside = saved(tmp_path / "c.zip", zipped({name: gzip.compress(data, mtime=0)}))
    assert storage.read_bytes(f"{inside}!/{name}") == data


# ---- S3


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    with faulty.moto() as url, faulty.before(url) as front:
        yield front


@pytest.fixture
def bucket(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The server with an empty bucket `xrays`."""
    for name in ("AWS_PROFILE", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in faulty.variables(server.url).items():
        monkeypatch.setenv(name, value)
    objects = boto3.resource("s3").Bucket("xrays")
    objects.create()
    objects.objects.delete()
    containers._slots.clear()
    server.one_in = 0
    server.seen.clear()
    return server


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_are_read_from_s3(bucket: Faulty, suffix: str) -> None:
    storage.write_bytes(f"s3://xrays/a.{suffix}", container(FILES, suffix))
    assert contents(storage.archive_root(f"s3://xrays/a.{suffix}")) == FILES


def test_a_member_of_a_zip_file_on_s3_is_one_request(bucket: Faulty) -> None:
    files = {f"{number:03d}.dcm": RNG.randbytes(5000) for number in range(40)}
    storage.write_bytes("s3://xrays/a.zip", zipped(files))
    bucket.seen.clear()
    entries = list(storage.list_files("s3://xrays/a.zip!"))
    assert len(bucket.seen) == 1  # the end of the file, which contains the directory
    assert {entry.path: storage.read_bytes(entry.uri) for entry in entries} == files
    assert len(bucket.seen) == 1 + len(files)


def test_a_member_of_a_tar_file_on_s3_is_one_request(bucket: Faulty) -> None:
    files = {f"{number:03d}.dcm": RNG.randbytes(75_000) for number in range(40)}
    storage.write_bytes("s3://xrays/a.tar", tarred(files))
    bucket.seen.clear()
    entries = list(storage.list_files("s3://xrays/a.tar!"))
    assert len(bucket.seen) <= 5  # 3 MB in blocks of 1 MiB
    before = len(bucket.seen)
    assert {entry.path: storage.read_bytes(entry.uri) for entry in entries} == files
    assert len(bucket.seen) == before + len(files)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failed_requests_to_containers_are_retried(bucket: Faulty, suffix: str) -> None:
    storage.write_bytes(f"s3://xrays/a.{suffix}", container(FILES, suffix))
    bucket.one_in = 3
    assert contents(f"s3://xrays/a.{suffix}!") == FILES
    assert sum(bucket.counts.get(fault, 0) for fault in faulty.PASSING) > 2


def test_missing_containers_do_not_exist(bucket: Faulty, tmp_path: Path) -> None:
    for uri in ("s3://xrays/none.zip!", "s3://xrays/none.tar!", f"{tmp_path}/none.zip!", f"{tmp_path}/none.tgz!"):
        assert not storage.exists(uri)
        with pytest.raises(NotFoundError, match="does not exist"):
            list(storage.list_files(uri))
        with pytest.raises(NotFoundError, match="does not exist"):
            storage.read_bytes(f"{uri}/1.dcm")
