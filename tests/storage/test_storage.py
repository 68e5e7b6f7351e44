"""Storage on disks and on an S3 server that throttles, refuses and loses connections."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
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
from cxr.storage import NotFoundError, StorageError, UnreadableError, filesystems, retries


class Front:
    """An S3 server that fails the next `failures` requests, refuses keys with "secret", wants signatures."""

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
def front() -> Iterator[Front]:
    front = Front()
    thread = threading.Thread(target=front.server.serve_forever, daemon=True)
    thread.start()
    yield front
    front.server.shutdown()
    front.server.server_close()
    thread.join()


@pytest.fixture
def s3(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """The server with an empty bucket `archive`, and the environment that leads there."""
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


def test_uris_have_one_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
def test_other_places_are_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"give a local path, file:///path, s3://bucket/key or gs://"):
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


def test_local_writes_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_local_links_are_followed_once_and_odd_names_kept(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "real" / "x.png"), "x")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xf6ntgen.png")).write_bytes(b"latin")
    (tmp_path / "circle.png").symlink_to("circle.png")
    assert paths(str(tmp_path)) == ["circle.png", "gone.png", "r\\xf6ntgen.png", "real/x.png"]
    (odd,) = [e for e in storage.list_files(str(tmp_path)) if "ntgen" in e.path]
    assert odd.uri.encode().isascii()
    assert storage.read_bytes(odd.uri) == b"latin"


@pytest.fixture
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pipe, a socket and a link to each and to a device, in `tmp_path`."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
    for name, target in {"to_pipe": "pipe", "to_socket": "socket", "to_device": "/dev/zero"}.items():
        (tmp_path / f"{name}.png").symlink_to(target)
    return ["pipe", "socket", "to_pipe.png", "to_socket.png", "to_device.png"]


def test_pipes_sockets_and_devices_are_not_listed_but_counted(tmp_path: Path, special: list[str]) -> None:
    (tmp_path / "a.png").write_text("a")
    left_out: Counter[str] = Counter()
    assert [entry.path for entry in storage.list_files(str(tmp_path), left_out)] == ["a.png"]
    assert left_out == {"pipe": 2, "socket": 2, "device": 1}


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path, special: list[str]) -> None:
    for name in special:
        for act in (storage.read_bytes, storage.read_parquet, lambda uri: list(storage.list_files(uri))):
            with pytest.raises(UnreadableError, match=rf"{name} is a (pipe|socket|device): expected a file"):
                act(str(tmp_path / name))
        _, files = storage.ray_storage(str(tmp_path))
        with pytest.raises(UnreadableError, match="expected a file"):
            files.open_input_stream(str(tmp_path / name))


def test_local_mistakes_are_explained(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for act in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(NotFoundError, match="nothing does not exist"):
            act(missing)
    with pytest.raises(StorageError, match="Is a directory"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(StorageError, match="never deleted"):
        storage.delete("/")
    storage.write_text(missing, "{")
    with pytest.raises(StorageError, match="is not JSON"):
        storage.read_json(missing)


# ---- S3


def test_s3_files(s3: Front, tmp_path: Path) -> None:
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


def test_s3_lists_page_by_page(s3: Front) -> None:
    for number in range(1050):
        s3_backends["123456789012"]["aws"].put_object("archive", f"many/{number}.png", b"")
    listed = storage.list_files("s3://archive/many")
    next(listed)
    assert s3.requests == 1
    assert len(list(listed)) == 1049
    assert s3.requests == 2


def test_folders_go_up_and_come_down(s3: Front, tmp_path: Path) -> None:
    for part in ("weights.pt", "deep/recipe.json"):
        storage.write_text(str(tmp_path / "run" / part), part)
    storage.upload_folder(tmp_path / "run", "s3://archive/best")
    storage.download_folder("s3://archive/best", tmp_path / "back")
    assert paths("s3://archive/best") == ["deep/recipe.json", "weights.pt"]
    assert (tmp_path / "back" / "deep" / "recipe.json").read_text() == "deep/recipe.json"


def test_a_key_cannot_climb_out_of_the_folder(s3: Front, tmp_path: Path) -> None:
    storage.s3.client("archive").put_object(Bucket="archive", Key="evil/../../out.txt", Body=b"!")
    with pytest.raises(StorageError, match="would land outside"):
        storage.download_folder("s3://archive/evil", tmp_path / "in")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [503, 500, 0], ids=["throttled", "broken", "connection lost"])
def test_passing_troubles_are_waited_out(s3: Front, status: int) -> None:
    storage.write_text("s3://archive/a.txt", "a")
    s3.status = status
    s3.failures = 4
    assert storage.read_text("s3://archive/a.txt") == "a"
    s3.failures = 4
    storage.write_text("s3://archive/b.txt", "b")
    s3.failures = 4
    assert paths("s3://archive") == ["a.txt", "b.txt"]
    assert s3.failures == 0


def test_patience_has_an_end(s3: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "1")
    s3.failures = 10**6
    begin = time.monotonic()
    for act in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(StorageError, match=rf"{s3.url} keeps failing: check it and the network"):
            act("s3://archive/a.txt")
    assert time.monotonic() - begin < 15


def test_refusals_are_not_tried_again(s3: Front) -> None:
    for act in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"")):
        s3.requests = 0
        with pytest.raises(StorageError, match=r"refused access \(403\): check AWS_ACCESS_KEY_ID"):
            act("s3://archive/secret.png")
        assert s3.requests <= 3  # one, and two to learn whether other objects are given


def test_what_is_missing_is_not_tried_again(s3: Front) -> None:
    begin = time.monotonic()
    for act in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(NotFoundError, match=r"s3://archive/none.png does not exist"):
            act("s3://archive/none.png")
        with pytest.raises(StorageError, match=rf"no bucket 'nowhere' on {s3.url}"):
            act("s3://nowhere/a.png")
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        storage.write_bytes("s3://nowhere/a.png", b"")
    assert time.monotonic() - begin < 2


def test_absent_credentials_are_named(s3: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url + "/")  # another spelling: no client is kept for it
    for act in (storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(StorageError, match="none were found: set AWS_ACCESS_KEY_ID"):
            act("s3://archive/a.png")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_files_head_and_size_are_checked_before_the_rest_is_read(place: str, s3: Front, tmp_path: Path) -> None:
    uri = "s3://archive/a.bin" if place == "s3" else str(tmp_path / "a.bin")
    content = bytes(range(256)) * 400
    storage.write_bytes(uri, content)
    checked = []
    assert storage.read_bytes(uri, check=lambda *given: checked.append(given)) == content
    assert checked == [(content[:4096], len(content))]

    def refuse(head: bytes, size: int) -> None:
        raise ValueError("no image")

    before = s3.requests
    with pytest.raises(ValueError, match="no image"):
        storage.read_bytes(uri, check=refuse)
    assert s3.requests - before == (1 if place == "s3" else 0)
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri, check=lambda head, size: checked.append((head, size))) == b""
    assert checked[-1] == (b"", 0)


# ---- Google Cloud Storage, its service stood in for by a folder


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
    ("text", "passes"),
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
def test_which_troubles_may_pass(text: str, passes: bool) -> None:
    assert retries.may_pass(OSError(text)) is passes
