"""Storage on local disks and on an S3 server that throttles, denies access and drops connections."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from cxr import storage
from cxr.storage import NotFoundError, StorageError, UnreadableError, filesystems, listing, retries


class FlakyS3:
    """An S3 server that fails the next `failures` requests, denies keys with "secret" and requires signatures."""

    def __init__(self) -> None:
        self.failures, self.status, self.requests = 0, 503, 0
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        request = Request(environ)
        if self.failures > 0:
            self.failures -= 1
            if self.status == 0:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return _refusal(request, self.status or 500, "SlowDown")(environ, start_response)
        if "secret" in request.path or "Authorization" not in request.headers:
            return _refusal(request, 403, "AccessDenied")(environ, start_response)
        return self._s3(environ, start_response)


def _refusal(request: Request, status: int, code: str) -> Response:
    request.get_data()
    return Response(f"<Error><Code>{code}</Code><Message>no</Message></Error>", status, mimetype="text/xml")


@pytest.fixture(scope="module")
def front() -> Iterator[FlakyS3]:
    front = FlakyS3()
    thread = threading.Thread(target=front.server.serve_forever, daemon=True)
    thread.start()
    yield front
    front.server.shutdown()
    front.server.server_close()
    thread.join()


@pytest.fixture
def s3(front: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> FlakyS3:
    """The server with an empty bucket `archive`; the environment points to it."""
    for variable in [v for v in os.environ if v.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable, value in {
        "AWS_ENDPOINT_URL": front.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(variable, value)
    front.failures, front.status = 0, 503
    bucket = boto3.resource("s3", region_name="us-east-1").Bucket("archive")
    bucket.create()
    bucket.objects.delete()
    front.requests = 0
    return front


def paths(uri: str) -> list[str]:
    return sorted(entry.path for entry in storage.list_files(uri))


# ---- URIs


def test_normalize_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("a/../b/") == f"{tmp_path}/b"
    assert storage.normalize("file:///x/a%20b/") == "/x/a b"
    assert storage.normalize("s3://bucket/key/") == "s3://bucket/key"
    assert storage.join("s3://bucket/", "a/", "/b.png") == "s3://bucket/a/b.png"
    assert storage.join("/", "a") == "/a"
    assert storage.name("s3://bucket/a/b.png") == "b.png"
    assert storage.is_local("b")
    assert not storage.is_local("gs://bucket/b")


@pytest.mark.parametrize("uri", ["ftp://host/x", "http://host/x", "s3://", "s3:///key", "file://host/x", ""])
def test_unsupported_uris_are_rejected(uri: str) -> None:
    with pytest.raises(StorageError, match=r"expected a local path, file:///path, s3://bucket/key or gs://"):
        storage.normalize(uri)


# ---- Local disks


def test_local_files(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "new/folder/a.json")
    storage.write_json(uri, {"view": "PA", "name": "Röntgen"})
    storage.write_bytes("file://" + uri.replace("a.json", "b%20c.bin"), b"123")
    assert storage.read_json(uri) == {"view": "PA", "name": "Röntgen"}
    assert paths(str(tmp_path)) == ["new/folder/a.json", "new/folder/b c.bin"]
    assert [e.size for e in storage.list_files(str(tmp_path)) if e.path.endswith(".bin")] == [3]
    assert storage.exists(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(str(tmp_path / "new"))
    assert paths(str(tmp_path)) == []


def test_local_writes_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    storage.write_text(str(target), "old")

    def full_disk(*_: object) -> None:
        assert target.read_text() == "old"
        assert paths(str(tmp_path)) == ["a.txt"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_text(str(target), "new and longer")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_listing_follows_links_once_and_supports_undecodable_names(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "real" / "x.png"), "x")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xf6ntgen.png")).write_bytes(b"latin")
    (tmp_path / "circle.png").symlink_to("circle.png")
    assert paths(str(tmp_path)) == ["circle.png", "gone.png", "r\\xf6ntgen.png", "real/x.png"]
    (odd,) = [e for e in storage.list_files(str(tmp_path)) if "ntgen" in e.path]
    assert odd.uri.encode().isascii()
    assert storage.read_bytes(odd.uri) == b"latin"


def test_what_vanishes_during_a_listing_is_left_out(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / "x").write_text("x")
    for name in "efgh":
        (tmp_path / "files" / name).write_text("x")
    listing_now = storage.list_files(str(tmp_path / "files"))
    first = next(listing_now)
    (tmp_path / "files").rename(tmp_path / "moved")
    assert [first, *listing_now] == [first]
    with pytest.raises(NotFoundError, match="files does not exist"):
        next(storage.list_files(str(tmp_path / "files")))


def test_folders_that_pyarrow_cannot_open_are_named(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xf6ntgen"))
    folder.mkdir()
    (folder / "a.png").write_bytes(b"?")
    expected = r"expected a path in UTF-8, got \S+/r\\xf6ntgen(/b)?: rename the files or folders with \\x in it"
    for uri in (str(folder), *(entry.uri.rpartition("/")[0] for entry in storage.list_files(str(folder)))):
        for operation in (
            storage.exists,
            storage.check_readable,
            storage.check_writable,
            storage.archive_root,
            lambda uri: storage.write_text(f"{uri}/b", "?"),
        ):
            with pytest.raises(StorageError, match=expected):
                operation(uri)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on file systems without hard links, such as exFAT."""

    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    uri = str(tmp_path / "new" / "key")
    with ThreadPoolExecutor(8) as pool:
        texts = [str(number).encode() for number in range(8)]
        written = list(pool.map(lambda text: storage.replace_if(uri, text, None, private=True), texts))
    assert written.count(True) == 1
    assert storage.read_bytes(uri) == texts[written.index(True)]
    assert [path.name for path in Path(uri).parent.iterdir()] == ["key"]
    assert stat.S_IMODE(Path(uri).stat().st_mode) == 0o600


@pytest.fixture
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Create a pipe, a socket and links to them and to a device in `tmp_path`."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the length of a socket's path is limited
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind("socket")
    for name, target in {"to_pipe": "pipe", "to_socket": "socket", "to_device": "/dev/zero"}.items():
        (tmp_path / f"{name}.png").symlink_to(target)
    return ["pipe", "socket", "to_pipe.png", "to_socket.png", "to_device.png"]


def test_listing_skips_and_counts_pipes_sockets_and_devices(tmp_path: Path, special: list[str]) -> None:
    (tmp_path / "a.png").write_text("a")
    left_out: Counter[str] = Counter()
    assert [entry.path for entry in storage.list_files(str(tmp_path), left_out)] == ["a.png"]
    assert left_out == {"pipe": 2, "socket": 2, "device": 1}


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path, special: list[str]) -> None:
    for name in special:
        for operation in (storage.read_bytes, storage.read_parquet, lambda uri: list(storage.list_files(uri))):
            with pytest.raises(UnreadableError, match=rf"expected a file, got \S*{name}, a (pipe|socket|device)"):
                operation(str(tmp_path / name))
        _, files = storage.ray_storage(str(tmp_path))
        with pytest.raises(UnreadableError, match="expected a file"):
            files.open_input_stream(str(tmp_path / name))


def test_errors_of_local_files(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for operation in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(NotFoundError, match="nothing does not exist"):
            operation(missing)
    with pytest.raises(StorageError, match="Is a directory"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(StorageError, match="never deleted"):
        storage.delete("/")
    storage.write_text(missing, "{")
    with pytest.raises(StorageError, match="is not valid JSON"):
        storage.read_json(missing)


# ---- S3


def test_s3_files(s3: FlakyS3, tmp_path: Path) -> None:
    storage.write_bytes("s3://archive/a/b/x.bin", b"x" * 1000)
    storage.write_text("s3://archive/a/y.txt", "y")
    assert storage.read_bytes("s3://archive/a/b/x.bin") == b"x" * 1000
    assert paths("s3://archive/a") == ["b/x.bin", "y.txt"]
    assert paths("s3://archive/a/y.txt") == ["y.txt"]
    assert sorted(e.uri for e in storage.list_files("s3://archive"))[0] == "s3://archive/a/b/x.bin"
    storage.delete("s3://archive/a/b/x.bin")
    assert not storage.exists("s3://archive/a/b/x.bin")
    assert paths("s3://archive/a") == ["y.txt"]
    filesystem, path = storage.filesystem("s3://archive/a/y.txt")
    assert filesystem.get_file_info(path).size == 1


def test_s3_listing_is_paged(s3: FlakyS3) -> None:
    for number in range(1050):
        s3_backends["123456789012"]["aws"].put_object("archive", f"many/{number}.png", b"")
    listed = storage.list_files("s3://archive/many")
    next(listed)
    assert s3.requests == 1
    assert len(list(listed)) == 1049
    assert s3.requests == 3, "the second one asks for folders"


@pytest.mark.slow
def test_folders_of_a_large_s3_listing_are_listed_at_the_same_time(
    s3: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every object once, wherever it lies, in a few requests more than there are pages."""
    folders = {f"split/{number}": 450 for number in range(5)} | {"split/3/deep": 1200, "split": 7, "split/z": 1}
    expected = [f"{folder}/{number:05d}.png" for folder, count in folders.items() for number in range(count)]
    for path in expected:
        s3_backends["123456789012"]["aws"].put_object("archive", f"wide/{path}", b"")
    together: list[int] = []
    pooled = listing.ThreadPoolExecutor.map

    def counting(pool: Any, work: Any, requests: list[Any]) -> Any:
        together.append(len(requests))
        return pooled(pool, work, requests)

    monkeypatch.setattr(listing.ThreadPoolExecutor, "map", counting)
    assert sorted(entry.path for entry in storage.list_files("s3://archive/wide")) == sorted(expected)
    assert together[0] >= 3
    assert s3.requests <= 12


def versions(uri: str) -> dict[str, tuple[int, str]]:
    return {entry.path: (entry.size, entry.version) for entry in storage.list_files(uri)}


def test_a_replaced_file_has_another_version(s3: FlakyS3, tmp_path: Path) -> None:
    for root in ("s3://archive/a", str(tmp_path)):
        for name in ("same.png", "replaced.png"):
            storage.write_bytes(f"{root}/{name}", b"1234")
        before = versions(root)
        assert versions(f"{root}/same.png") == {"same.png": before["same.png"]}  # listed alone
        if root == str(tmp_path):
            os.utime(tmp_path / "replaced.png", ns=(1, 1))
        storage.write_bytes(f"{root}/replaced.png", b"4321")
        after = versions(root)
        assert after["same.png"] == before["same.png"]
        assert after["replaced.png"] != before["replaced.png"]
        assert all(version for _, version in after.values())


def test_upload_and_download_folder(s3: FlakyS3, tmp_path: Path) -> None:
    for part in ("weights.pt", "deep/recipe.json"):
        storage.write_text(str(tmp_path / "run" / part), part)
    storage.upload_folder(tmp_path / "run", "s3://archive/best")
    storage.download_folder("s3://archive/best", tmp_path / "back")
    assert paths("s3://archive/best") == ["deep/recipe.json", "weights.pt"]
    assert (tmp_path / "back" / "deep" / "recipe.json").read_text() == "deep/recipe.json"


def test_keys_cannot_escape_the_download_folder(s3: FlakyS3, tmp_path: Path) -> None:
    storage.s3.client("archive").put_object(Bucket="archive", Key="evil/../../out.txt", Body=b"!")
    with pytest.raises(StorageError, match="would be written outside"):
        storage.download_folder("s3://archive/evil", tmp_path / "in")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "status",
    [*(pytest.param(status, marks=pytest.mark.slow) for status in (503, 500)), 0],
    ids=["throttled", "broken", "connection lost"],
)
def test_transient_errors_are_retried(s3: FlakyS3, status: int) -> None:
    storage.write_text("s3://archive/a.txt", "a")
    s3.status = status
    s3.failures = 4
    assert storage.read_text("s3://archive/a.txt") == "a"
    s3.failures = 2
    storage.write_text("s3://archive/b.txt", "b")
    s3.failures = 2
    assert paths("s3://archive") == ["a.txt", "b.txt"]
    assert s3.failures == 0


def test_retries_stop_after_the_time_limit(s3: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "1")
    s3.failures = 10**6
    begin = time.monotonic()
    for operation in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(StorageError, match=rf"{s3.url} keeps failing: check the server and the network"):
            operation("s3://archive/a.txt")
    assert time.monotonic() - begin < 15


def test_the_time_limit_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "")
    assert not storage.exists(str(tmp_path / "a"))
    for text in ("1m", "-1", "nan"):
        monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", text)
        with pytest.raises(StorageError, match=f"expected CXR_STORAGE_PATIENCE_S to be .* seconds, got {text}: set"):
            storage.exists(str(tmp_path / "a"))


def test_denied_access_is_not_retried(s3: FlakyS3) -> None:
    for operation in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"")):
        s3.requests = 0
        with pytest.raises(StorageError, match=r"denied access \(403\): check AWS_ACCESS_KEY_ID"):
            operation("s3://archive/secret.png")
        assert s3.requests <= 3  # one, and two to find out whether its neighbors can be read


def test_missing_files_are_not_retried(s3: FlakyS3) -> None:
    begin = time.monotonic()
    for operation in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(NotFoundError, match=r"s3://archive/none.png does not exist"):
            operation("s3://archive/none.png")
        with pytest.raises(StorageError, match=rf"no bucket 'nowhere' on {s3.url}"):
            operation("s3://nowhere/a.png")
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        storage.write_bytes("s3://nowhere/a.png", b"")
    assert time.monotonic() - begin < 2


def test_missing_credentials_are_reported(s3: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url + "/")  # a different spelling, for which no client is cached
    for operation in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(StorageError, match="none were found: set AWS_ACCESS_KEY_ID"):
            operation("s3://archive/a.png")


@pytest.mark.parametrize("storage_kind", ["local", "s3"])
def test_check_sees_head_and_size_before_the_rest_is_read(storage_kind: str, s3: FlakyS3, tmp_path: Path) -> None:
    uri = "s3://archive/a.bin" if storage_kind == "s3" else str(tmp_path / "a.bin")
    content = bytes(range(256)) * 400
    storage.write_bytes(uri, content)
    checked = []
    assert storage.read_bytes(uri, check=lambda *head_and_size: checked.append(head_and_size)) == content
    assert checked == [(content[:4096], len(content))]

    def refuse(head: bytes, size: int) -> None:
        raise ValueError("no image")

    before = s3.requests
    with pytest.raises(ValueError, match="no image"):
        storage.read_bytes(uri, check=refuse)
    assert s3.requests - before == (1 if storage_kind == "s3" else 0)
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri, check=lambda head, size: checked.append((head, size))) == b""
    assert checked[-1] == (b"", 0)


# ---- Google Cloud Storage, simulated by a local folder


def test_gs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "a").mkdir(parents=True)
    stand_in = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(filesystems, "_gcs", lambda anonymous: stand_in)
    storage.write_text("gs://bucket/a/x.txt", "x")
    assert [(e.uri, e.path) for e in storage.list_files("gs://bucket/a")] == [("gs://bucket/a/x.txt", "x.txt")]
    assert paths("gs://bucket/a/x.txt") == ["x.txt"]
    assert storage.read_text("gs://bucket/a/x.txt") == "x"
    with pytest.raises(NotFoundError, match="gs://bucket/b does not exist"):
        list(storage.list_files("gs://bucket/b"))


@pytest.mark.parametrize(
    ("text", "transient"),
    [
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body", True),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56", True),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)", True),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body", False),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist", False),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during GetObject operation", False),
    ],
)
def test_is_transient(text: str, transient: bool) -> None:
    assert retries.is_transient(OSError(text)) is transient
