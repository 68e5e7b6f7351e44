"""STOW-RS: what is sent to a DICOMweb service on this machine, and what happens if the service refuses."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from cxr.cli.commands.export_dicom import Options, main
from cxr.errors import UserError
from cxr.export import dicom_push
from cxr.export.dicom_push import PASSWORD, TOKEN, USER, check_service
from tests.export.test_dicom import CLASSES, NAMES, positive, write_images
from tests.made_dicoms import scored, write_run, xray


@dataclass
class Pacs:
    """A DICOMweb service that stores objects in memory.

    Attributes:
        statuses: responses to the next requests, before it stores anything.
        refused: failure reasons by SOP Class UID.
        unmentioned: names of SOP classes that responses do not mention, whose objects are not stored.
        content_type: of responses; None for none.
        location: another address to which all requests are redirected.
        page: text of all responses, instead of what was stored.
        stored: contents of stored files by SOP Instance UID.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    unmentioned: tuple[str, ...] = ()
    content_type: str | None = "application/dicom+json"
    location: str = ""
    page: str | None = None
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[dict[str, str]] = field(default_factory=list)
    received: int = 0

    def respond(self, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        self.requests.append(headers)
        if self.statuses:
            return self.statuses.pop(0), {}
        boundary = re.search(r'boundary="([^"]+)"', headers["Content-Type"])
        assert boundary
        stored, failed = [], []
        for part in body.split(b"--" + boundary[1].encode())[1:-1]:
            data = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            ds = dcmread(BytesIO(data))
            self.received += 1
            if ds.SOPClassUID.name in self.unmentioned:
                continue
            about = {
                "00081150": {"vr": "UI", "Value": [ds.SOPClassUID]},
                "00081155": {"vr": "UI", "Value": [ds.SOPInstanceUID]},
            }
            if reason := self.refused.get(ds.SOPClassUID.name):
                failed.append(about | {"00081197": {"vr": "US", "Value": [reason]}})
            else:
                self.stored[ds.SOPInstanceUID] = data
                stored.append(about)
        content = {"00081199": {"vr": "SQ", "Value": stored}} if stored else {}
        content |= {"00081198": {"vr": "SQ", "Value": failed}} if failed else {}
        return (200 if not failed else 202 if stored else 409), content


@pytest.fixture
def pacs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pacs]:
    monkeypatch.setattr(dicom_push, "_WAIT_MS", 1)
    for name in (USER, PASSWORD, TOKEN):
        monkeypatch.delenv(name, raising=False)
    with serving(Pacs()) as service:
        yield service


@contextmanager
def serving(service: Pacs) -> Iterator[Pacs]:
    """Sets the URL of the service, which responds until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = service.respond(body, dict(self.headers))
            data = json.dumps(content).encode() if content else b""
            if service.page is not None:
                status, data = 200, service.page.encode()
            if service.location:
                status, data = 307, b""
            self.send_response(status)
            if service.location:
                self.send_header("Location", service.location)
            if service.content_type is not None:
                self.send_header("Content-Type", service.content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}/dicomweb"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> str:
    images = [xray(number) for number in range(3)]
    paths = write_images(tmp_path / "archive", images)
    rows = [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)]
    return write_run(tmp_path / "run", rows, CLASSES, family="localize", findings=NAMES, archive=tmp_path / "archive")


def export(run: str, tmp_path: Path, pacs: Pacs, **options: Any) -> dict[str, Any]:
    return main(Options(run=run, out=str(tmp_path / "out"), workers=1, push=pacs.url, **options))


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out/export.csv").open() as file:
        return list(csv.DictReader(file))


def test_objects_are_stored_once_and_changed_ones_again(run: str, tmp_path: Path, pacs: Pacs) -> None:
    result = export(run, tmp_path, pacs)
    files = {row["sop_uid"]: tmp_path / "out" / row["file"] for row in rows(tmp_path)}
    assert set(pacs.stored) == set(files)
    for uid, data in pacs.stored.items():
        assert dcmread(BytesIO(data)) == dcmread(files[uid])
    assert result["metrics"]["pushed"] == 6
    assert {row["pushed"] for row in rows(tmp_path)} == {pacs.url}
    export(run, tmp_path, pacs)
    assert pacs.received == 6
    lost = next(path for path in files.values() if path.name.startswith("sr-"))
    lost.unlink()
    export(run, tmp_path, pacs)
    assert pacs.received == 7


def test_an_overloaded_service_is_asked_again_with_the_whole_message(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.statuses = [503, 429]
    export(run, tmp_path, pacs)
    assert len(pacs.stored) == 6
    assert len({headers["Content-Length"] for headers in pacs.requests}) == 1


def test_what_was_stored_before_a_failure_is_not_sent_again(
    run: str, tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_push, "_BATCH_OBJECTS", 2)
    respond = pacs.respond

    def fail_later(body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        return respond(body, headers) if len(pacs.requests) < 2 else (500, {})

    pacs.respond = fail_later  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="run the same command again"):
        export(run, tmp_path, pacs)
    assert sum(bool(row["pushed"]) for row in rows(tmp_path)) == 4
    pacs.respond = respond  # pyright: ignore[reportAttributeAccessIssue]
    export(run, tmp_path, pacs)
    assert len(pacs.stored) == pacs.received == 6


def test_refused_objects_are_rows_with_the_reason_and_the_command_fails(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.refused = {"Comprehensive SR Storage": 0x0111}
    with pytest.raises(UserError, match="has not stored 3 objects"):
        export(run, tmp_path, pacs)
    kinds = {(row["kind"], bool(row["pushed"]), "does not replace it" in row["reason"]) for row in rows(tmp_path)}
    assert kinds == {("sr", False, True), ("sc", True, False)}
    pacs.refused = {}
    export(run, tmp_path, pacs)
    assert pacs.received == 6 + 3
    assert not any(row["reason"] for row in rows(tmp_path))


@pytest.mark.parametrize("content_type", ["application/dicom+json; charset=utf-8", "Application/JSON", None])
def test_responses_are_read_whatever_the_parameters_of_their_type(
    content_type: str | None, run: str, tmp_path: Path, pacs: Pacs
) -> None:
    pacs.content_type = content_type
    pacs.refused = {"Comprehensive SR Storage": 0x0111}
    with pytest.raises(UserError, match="has not stored 3 objects"):
        export(run, tmp_path, pacs)
    assert {(row["kind"], bool(row["pushed"])) for row in rows(tmp_path)} == {("sr", False), ("sc", True)}


def test_objects_that_the_response_does_not_mention_are_not_stored(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.unmentioned = ("Comprehensive SR Storage",)
    with pytest.raises(UserError, match="has not stored 3 objects"):
        export(run, tmp_path, pacs)
    reasons = {(row["kind"], bool(row["pushed"]), row["reason"]) for row in rows(tmp_path)}
    assert reasons == {("sr", False, "not stored: the response does not mention it"), ("sc", True, "")}


@pytest.mark.parametrize(
    ("content_type", "page"),
    [
        ("text/html", "<html>Please log in</html>"),
        ("application/dicom+json", "<html>Please log in</html>"),
        ("application/dicom+json", "[]"),
        ("application/dicom+xml", "not XML"),
        (None, "stored"),
        ("application/dicom+json", "{}"),
        ("application/dicom+json", ""),
    ],
)
def test_a_response_that_does_not_say_what_was_stored_ends_the_push(
    content_type: str | None, page: str, run: str, tmp_path: Path, pacs: Pacs
) -> None:
    pacs.content_type, pacs.page = content_type, page
    with pytest.raises(UserError, match="does not store objects at the moment"):
        export(run, tmp_path, pacs)
    assert not any(row["pushed"] for row in rows(tmp_path))


def test_objects_are_not_sent_to_where_a_service_redirects(run: str, tmp_path: Path, pacs: Pacs) -> None:
    with serving(Pacs()) as other:
        pacs.location = other.url
        with pytest.raises(UserError, match="got a redirect"):
            export(run, tmp_path, pacs)
    assert not other.requests
    assert not any(row["pushed"] for row in rows(tmp_path))


def test_a_service_that_stores_nothing_names_the_reason(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.refused = {"Comprehensive SR Storage": 0xC122}
    with pytest.raises(UserError, match="transfer syntax"):
        export(run, tmp_path, pacs, kinds=("sr",))


def test_wrong_credentials_end_the_push_at_once(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.statuses = [401]
    with pytest.raises(UserError, match="401 Unauthorized"):
        export(run, tmp_path, pacs)
    assert len(pacs.requests) == 1


def test_a_service_that_is_not_there_is_reported(run: str, tmp_path: Path, pacs: Pacs) -> None:
    pacs.url = "http://127.0.0.1:9/dicomweb"
    with pytest.raises(UserError, match="ConnectionError"):
        export(run, tmp_path, pacs)


@pytest.mark.parametrize("source", ["environment", "file"])
def test_credentials_are_sent_and_appear_nowhere(
    source: str,
    run: str,
    tmp_path: Path,
    pacs: Pacs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "login.json"
    if source == "environment":
        monkeypatch.setenv(TOKEN, "secret-token")
        result = export(run, tmp_path, pacs)
        expected = "Bearer secret-token"
    else:
        file.write_text(json.dumps({"user": "cxr", "password": "secret-token"}))
        result = export(run, tmp_path, pacs, credentials=str(file))
        expected = "Basic Y3hyOnNlY3JldC10b2tlbg=="
    assert {headers["Authorization"] for headers in pacs.requests} == {expected}
    printed = capsys.readouterr()
    texts = [printed.out, printed.err, json.dumps(result)]
    texts += [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".csv", ".json")]
    assert not [text for text in texts if "secret" in text]
    assert "secret" not in repr(check_service(pacs.url, "", {TOKEN: "secret-token"}))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://pacs.example.org/dicomweb", "https://"),
        ("ftp://pacs.example.org", "URL of a DICOMweb service"),
        ("https://cxr:secret@pacs.example.org/dicomweb", "with a plain URL"),
        ("https://pacs.example.org/dicomweb?token=secret", "with a plain URL"),
    ],
)
def test_unsafe_addresses_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_service(url, "", {})
    assert "secret" not in str(error.value)


def test_incomplete_credentials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only one of them"):
        check_service("https://pacs.example.org", "", {USER: "cxr"})
    for text in ("[]", "{}", "secret", '{"username": "secret"}'):
        (tmp_path / "login.json").write_text(text)
        with pytest.raises(UserError, match="JSON object") as error:
            check_service("https://pacs.example.org", str(tmp_path / "login.json"), {})
        assert "secret" not in str(error.value)
