"""An S3 server that fails on demand: a proxy on loopback before moto, or before any other server."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

LOOPBACK = "127.0.0.1"
RESET, TORN = "reset", "torn"  # the connection ends before the answer, or in the middle of it
PASSING = ("InternalError", RESET, TORN)
STATUS = {"SlowDown": 503, "InternalError": 500, "ExpiredToken": 400}  # any other code is a 403
SIGNER = re.compile(r"Credential=([^/]+)/\d+/[^/]*/(\w+)/")
PER_HOP = {"connection", "expect", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Seen:
    """A request, as it came in."""

    method: str
    path: str
    service: str  # that it is signed for; empty for none
    signer: str  # the id of the key that signed it; empty for none
    payer: str  # the value of x-amz-request-payer
    at: float = field(default_factory=time.monotonic, compare=False)


class Faulty:
    """The faults of the proxy; set the attributes while it serves.

    Attributes:
        one_in: one of this many requests gets one of PASSING in turn; 0 for none.
        refused: part of a path -> the S3 error code that every request to such a path gets, "" for all paths.
        expired: ids of keys whose requests get an ExpiredToken.
        counts: of requests, by what became of them: "ok" or the fault.
        seen: all requests.
    """

    def __init__(self, backend: str, tls: ssl.SSLContext | None = None) -> None:
        self.backend, self._tls = urlsplit(backend), tls
        self.expired, self.seen = set[str](), list[Seen]()
        self.one_in, self.refused, self.counts = 0, dict[str, str](), dict[str, int]()
        self.is_down, self._throttled_until = False, 0.0
        self._numbers, self._kinds, self._lock = itertools.count(1), itertools.cycle(PASSING), threading.Lock()
        self.server = self._start(0)
        self.url = f"{'https' if tls else 'http'}://{LOOPBACK}:{self.server.server_port}"

    def throttle(self, seconds: float) -> None:
        """Answer every request with 503 SlowDown for so long."""
        self._throttled_until = time.monotonic() + seconds

    def down(self, seconds: float) -> None:
        """Refuse connections for this time, and close open ones; returns when the server is up again."""
        self.is_down = True
        self.close()
        time.sleep(seconds)
        self.is_down = False
        self.server = self._start(self.server.server_port)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _start(self, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"faulty": self})
        server = ThreadingHTTPServer((LOOPBACK, port), handler)
        if self._tls:
            server.socket = self._tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return server

    def fault(self, request: Seen) -> str:
        """The fault of the next request; "" for a correct response."""
        with self._lock:
            self.seen.append(request)
            kind = "ExpiredToken" if request.signer in self.expired else self._next_fault(unquote(request.path))
            self.counts[kind or "ok"] = self.counts.get(kind or "ok", 0) + 1
            return kind

    def _next_fault(self, path: str) -> str:
        if self.is_down:
            return RESET
        if time.monotonic() < self._throttled_until:
            return "SlowDown"
        if code := next((code for part, code in self.refused.items() if part in path), ""):
            return code
        return next(self._kinds) if self.one_in and next(self._numbers) % self.one_in == 0 else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: Faulty

    def _answer(self) -> None:
        body = self._body()
        self.path = self.path.removeprefix(f"http://{self.headers['Host']}")  # whole, where this is a proxy
        signed = SIGNER.search(self.headers.get("Authorization", ""))
        signer, service = signed.groups() if signed else ("", "")
        payer = self.headers.get("x-amz-request-payer", "")
        fault = self.faulty.fault(Seen(self.command, self.path, service, signer, payer))
        if fault == RESET:
            self._close_connection()
        elif fault and fault != TORN:
            text = f"<Error><Code>{fault}</Code><Message>no</Message></Error>".encode()
            self._send(STATUS.get(fault, 403), [("Content-Type", "text/xml")], text, len(text))
        else:
            self._forward(body, torn=fault == TORN)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes, *, torn: bool) -> None:
        """Ask the server behind; of a torn answer the client gets the half."""
        backend = self.faulty.backend
        connection = HTTPConnection(backend.hostname or LOOPBACK, backend.port, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {*PER_HOP, "content-length"}:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        self._send(response.status, _forwarded_headers(response), data[: len(data) // 2] if torn else data, len(data))
        if torn:
            self._close_connection()

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _close_connection(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _forwarded_headers(response: HTTPResponse) -> list[tuple[str, str]]:
    return [(name, value) for name, value in response.getheaders() if name.lower() not in PER_HOP]


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """moto's S3, in memory; yields its URL."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs every request
    server = make_server(LOOPBACK, 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{LOOPBACK}:{server.port}"
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def before(backend: str, tls: ssl.SSLContext | None = None) -> Iterator[Faulty]:
    """A faulty proxy before the server at the URL `backend`."""
    proxy = Faulty(backend, tls)
    yield proxy
    proxy.close()


def variables(url: str) -> dict[str, str]:
    """The environment variables with which S3 clients use the server at `url` and no other."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
