"""Damaged and hostile containers give user errors or errors of one member: no crash, no hang, no escape."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr import storage
from cxr.errors import UserError
from cxr.storage import UnreadableError, inflate, member_names, zip_container
from tests.made_containers import SUFFIXES, container, saved, tarred, zipped

RNG = random.Random(1)
FILES = {f"images/{number}.dcm": RNG.randbytes(3000) + bytes(3000) for number in range(8)}
MUTATIONS = 60  # of each kind of container
CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def read_all(root: str) -> tuple[dict[str, bytes], int]:
    """The members that can be read, and the number of those that cannot."""
    good: dict[str, bytes] = {}
    reasons: list[str | None] = []
    for entry in storage.list_files(root):
        try:
            good[entry.path] = storage.read_bytes(entry.uri)
        except UnreadableError as error:
            reasons.append(getattr(error.__cause__, "strerror", None))
    assert all(reasons), "rows show these reasons"
    return good, len(reasons)


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 5, 40])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def flip_structure(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of headers, which lead further than the contents."""
    starts = [at for at in range(len(data)) if data.startswith((b"PK", b"ustar"), at)] or [0]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3])):
        at = rng.choice(starts) + rng.randrange(-157, 60)
        changed[max(0, min(at, len(data) - 1))] = rng.randrange(256)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """Repeat, move or remove a piece."""
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    at = rng.randrange(len(data))
    return rng.choice([data[:at] + data[start:end] + data[at:], data[:start] + data[end:]])


@pytest.mark.parametrize("mutate", [flip, flip_structure, truncate, splice])
@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_mutated_containers(tmp_path: Path, suffix: str, mutate: Callable[[bytes, random.Random], bytes]) -> None:
    rng = random.Random(f"{suffix} {mutate.__name__}")
    whole, outcomes = container(FILES, suffix), Counter[str]()
    started = time.monotonic()
    for number in range(MUTATIONS):
        uri = saved(tmp_path / f"{number}.{suffix}", mutate(whole, rng))
        try:
            good, bad = read_all(f"{uri}!")
        except UserError:
            outcomes["container"] += 1
            continue
        outcomes["member" if bad else "nothing"] += 1
        if suffix == "zip":  # every member has a checksum
            assert all(data == FILES.get(path, data) for path, data in good.items())
    assert outcomes["container"] + outcomes["member"] > MUTATIONS / 6, outcomes
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("mutate", [flip, truncate])
def test_mutated_compressed_dicom_files(tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes]) -> None:
    rng, data, unreadable = random.Random(2), FILES["images/0.dcm"], 0
    for number in range(MUTATIONS):
        uri = saved(tmp_path / f"{number}.dcm.gz", mutate(gzip.compress(data, mtime=0), rng))
        try:
            storage.read_bytes(uri)
        except UnreadableError:
            unreadable += 1
    assert unreadable > MUTATIONS / 2


# ---- Damage


def test_members_before_the_damage_of_a_tar_file_are_listed_and_the_rest_is_an_entry(tmp_path: Path) -> None:
    data = tarred(FILES)
    fifth = data.index(b"images/5.dcm")
    broken_header = data[:fifth] + b"\xff" * 512 + data[fifth + 512 :]
    for damaged in (
        data[: fifth + 1000],
        broken_header,
        gzip.compress(broken_header, mtime=0),
        gzip.compress(data, mtime=0)[:-9000],
    ):
        suffix = "tgz" if damaged.startswith(b"\x1f\x8b") else "tar"
        uri = saved(tmp_path / f"a{len(damaged)}.{suffix}", damaged)
        entries = list(storage.list_files(f"{uri}!"))
        assert entries[-1].path == f"a{len(damaged)}.{suffix}!"
        with pytest.raises(UnreadableError, match="damaged or truncated after"):
            storage.read_bytes(entries[-1].uri)
        good, bad = read_all(f"{uri}!")
        assert 2 <= len(good) <= 5
        assert good.items() <= FILES.items()
        assert bad <= 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_not_containers_are_rejected(tmp_path: Path, suffix: str) -> None:
    for number, data in enumerate([b"", b"<html>", bytes(100_000), RNG.randbytes(100_000)]):
        uri = saved(tmp_path / f"{number}.{suffix}", data)
        if data == bytes(100_000) and suffix == "tar":
            assert list(storage.list_files(f"{uri}!")) == []  # a valid TAR file without members
            continue
        with pytest.raises(UnreadableError, match="repair, repack or remove it"):
            list(storage.list_files(f"{uri}!"))


def unreadable(tmp_path: Path, data: bytes) -> str:
    """The reason why the only member of a ZIP file cannot be read, as rows show it."""
    uri = saved(tmp_path / "a.zip", data)
    (entry,) = storage.list_files(f"{uri}!")
    with pytest.raises(UnreadableError) as caught:
        storage.read_bytes(entry.uri)
    assert isinstance(caught.value.__cause__, OSError)
    return caught.value.__cause__.strerror


def patched(data: bytes, offset: int, value: bytes, signature: bytes = CENTRAL) -> bytes:
    """A ZIP file with another value at an offset of its only member's directory entry, or local header."""
    at = data.rindex(signature) + offset
    return data[:at] + value + data[at + len(value) :]


def test_reasons_of_unreadable_members(tmp_path: Path) -> None:
    data = zipped({"1.dcm": bytes(1000) + b"x"})
    assert unreadable(tmp_path, patched(data, 8, b"\x01\x00")) == "it is encrypted"
    method = "its compression method is not supported"
    assert unreadable(tmp_path, patched(data, 10, b"\x09\x00")) == f"{method} (Deflate64)"
    assert unreadable(tmp_path, patched(data, 10, b"\x63\x00")) == f"{method} (99)"
    assert unreadable(tmp_path, patched(data, 16, b"\x00")) == "its checksum is wrong"
    assert unreadable(tmp_path, patched(data, 20, struct.pack("<I", 10_000))) == "it overlaps other members"
    assert unreadable(tmp_path, patched(data, 24, struct.pack("<I", 1000))) == "it is larger than its header says"
    assert unreadable(tmp_path, patched(data, 24, struct.pack("<I", 1002))) == "it is truncated"
    assert unreadable(tmp_path, patched(data, 0, b"XX", LOCAL)) == "its header is missing"
    stored = zipped({"1.dcm": bytes(1000)}, zipfile.ZIP_STORED)
    assert unreadable(tmp_path, patched(stored, 24, struct.pack("<I", 999))) == "its header is damaged"


# ---- Bombs


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_is_decompressed_only_to_the_size_in_its_header(tmp_path: Path, method: int) -> None:
    data = patched(zipped({"1.dcm": bytes(100 << 20)}, method), 24, struct.pack("<I", 5000))
    assert peak_bytes(lambda: unreadable(tmp_path, data)) < 12 << 20  # LZMA's dictionary takes 8 MiB
    assert unreadable(tmp_path, data) == "it is larger than its header says"


def test_claimed_sizes_are_not_allocated(tmp_path: Path) -> None:
    data = zipped({"1.dcm": RNG.randbytes(3 << 20)})
    data = patched(data, 24, struct.pack("<I", 2 << 30))
    assert peak_bytes(lambda: unreadable(tmp_path, data)) < 20 << 20
    packed = gzip.compress(RNG.randbytes(1000), mtime=0)
    uri = saved(tmp_path / "a.dcm.gz", packed[:-4] + struct.pack("<I", 60 << 20))
    with pytest.raises(UnreadableError, match="damaged"):
        storage.read_bytes(uri)


def test_decompression_bombs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    data = zipped({"1.dcm": bytes(70 << 20)}, zipfile.ZIP_BZIP2)
    assert unreadable(tmp_path, data) == "a decompression bomb"
    data = zipped({"1.dcm": b"x" * 1000})
    assert unreadable(tmp_path, patched(data, 24, struct.pack("<I", inflate.MAX_BYTES + 1))) == "larger than 2 GiB"
    uri = saved(tmp_path / "a.dcm.gz", gzip.compress(b"x", mtime=0)[:-4] + struct.pack("<I", 1 << 30))
    with pytest.raises(UnreadableError, match="bomb"):
        storage.read_bytes(uri)
    uri = saved(tmp_path / "b.dcm.gz", gzip.compress(bytes(70 << 20), mtime=0) + gzip.compress(b"x", mtime=0))

    def refused() -> None:
        with pytest.raises(UnreadableError, match="bomb"):
            storage.read_bytes(uri)

    assert peak_bytes(refused) < 20 << 20
    uri = saved(tmp_path / "c.dcm.gz", gzip.compress(b"x", mtime=0) + gzip.compress(b"y", mtime=0)[:-3])
    with pytest.raises(UnreadableError, match="its compressed data are damaged"):
        storage.read_bytes(uri)


def test_a_compressed_tar_file_may_not_be_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.storage.gzip_random_access._RATIO_EXEMPT", 1 << 20)
    uri = saved(tmp_path / "a.tgz", tarred({"1.dcm": b"x", "2.dcm": bytes(20 << 20), "3.dcm": b"x"}, gzipped=True))
    assert [entry.path for entry in storage.list_files(f"{uri}!")] == ["1.dcm", "2.dcm", "a.tgz!"]
    with pytest.raises(UnreadableError, match="bomb"):
        storage.read_bytes(f"{uri}!/2.dcm")


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """As in "A better zip bomb" (Fifield 2019): many directory entries share the same compressed bytes."""
    local = LOCAL + struct.pack("<5H3I2H", 20, 0, 8, 0, 0, 0, 0, 0, 1, 0)
    body = zlib.compress(bytes(1 << 20), wbits=-15)
    sizes = struct.pack("<3I", zlib.crc32(bytes(1 << 20)), len(body), 1 << 20)
    entries = b"".join(
        CENTRAL + struct.pack("<6H", 20, 20, 0, 8, 0, 0) + sizes + struct.pack("<5H2I", 1, 0, 0, 0, 0, 0, 0) + name
        for name in (b"a", b"b", b"c")
    )
    start = len(local) + 1 + len(body)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 3, 3, len(entries), start, 0)
    uri = saved(tmp_path / "a.zip", local + b"a" + body + entries + end)
    assert read_all(f"{uri}!") == ({}, 3)


def test_too_many_members_and_too_large_directories_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_names, "MAX_MEMBERS", 7)
    for suffix in SUFFIXES[:2]:
        uri = saved(tmp_path / f"a.{suffix}", container(FILES, suffix))
        if suffix == "zip":
            with pytest.raises(UnreadableError, match="more than 7 members"):
                list(storage.list_files(f"{uri}!"))
        else:
            assert read_all(f"{uri}!")[1] == 1
    monkeypatch.undo()
    monkeypatch.setattr(zip_container, "MAX_DIRECTORY_BYTES", 400)
    with pytest.raises(UnreadableError, match="directory"):
        list(storage.list_files(saved(tmp_path / "b.zip", zipped(FILES)) + "!"))


# ---- Names


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_unsafe_names_are_counted_and_repeated_ones_count_once(tmp_path: Path, suffix: str) -> None:
    names = [
        "../up.dcm",
        "a/../../b.dcm",
        "/etc/passwd",
        "C:\\x.dcm",
        "..\\up.dcm",
        "./ok/./1.dcm",
        "win\\2.dcm",
        "ok/1.dcm",
    ]
    stream = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            for number, name in enumerate(names):
                file.writestr(zipfile.ZipInfo(name), bytes([number]))
    else:
        with tarfile.open(fileobj=stream, mode="w") as file:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = 1
                file.addfile(info, io.BytesIO(bytes([number])))
    special = Counter[str]()
    uri = saved(tmp_path / f"a.{suffix}", stream.getvalue())
    listed = {entry.path: storage.read_bytes(entry.uri) for entry in storage.list_files(f"{uri}!", special)}
    assert listed == {"ok/1.dcm": bytes([7]), "win/2.dcm": bytes([6])}
    assert special == {"unsafe name": 5, "repeated name": 1}


def test_links_devices_and_sparse_files_are_not_followed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, kind in (
            ("l", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("d", tarfile.BLKTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(f"{name}.dcm")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        file.addfile(tarfile.TarInfo("1.dcm"))
    special = Counter[str]()
    uri = saved(tmp_path / "a.tar", stream.getvalue())
    assert [entry.path for entry in storage.list_files(f"{uri}!", special)] == ["1.dcm"]
    assert special == {"link": 2, "device": 2}

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        info = zipfile.ZipInfo("l.dcm")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
        file.mkdir("folder")
    special.clear()
    uri = saved(tmp_path / "a.zip", stream.getvalue())
    assert list(storage.list_files(f"{uri}!", special)) == []
    assert special == {"link": 1}


def test_member_names_cannot_leave_their_container(tmp_path: Path) -> None:
    saved(tmp_path / "secret.dcm", b"secret")
    for suffix in SUFFIXES:
        uri = saved(tmp_path / f"a.{suffix}", container({"../secret.dcm": b"x", "1.dcm": b"1"}, suffix))
        assert read_all(f"{uri}!") == ({"1.dcm": b"1"}, 0)
