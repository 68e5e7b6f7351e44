"""An S3 server of the files in a folder that answers late and sends slowly, in a process of its own.

It only reads: bucket `xrays` is the folder. Each request waits for a latency, and each response is sent at a limited
rate, as if every connection led to a distant store.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

LATENCY_S, BYTES_PER_S = 0.025, 80e6  # of a request, and of a response, as assumed for S3 in the same region
BUCKET = "xrays"
_COUNT = "/requests"  # path that returns the number of requests so far, without counting itself
_CHUNK = 1 << 18
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class SlowS3:
    """A running server."""

    url: str

    def requests(self) -> int:
        """Number of requests so far."""
        with urlopen(self.url + _COUNT) as response:
            return int(response.read())


@contextlib.contextmanager
def serve(folder: Path, latency_s: float = LATENCY_S, bytes_per_s: float = BYTES_PER_S) -> Iterator[SlowS3]:
    """Serve the files of a folder as `s3://xrays/…`."""
    command = [sys.executable, "-m", "tests.servers.slow", str(folder), str(latency_s), str(bytes_per_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield SlowS3(process.stdout.readline().strip())
        process.kill()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and the first bytes are sent together
    folder: Path
    latency_s: float
    bytes_per_s: float
    seen: list[str]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == _COUNT:
            self._send(200, str(len(self.seen)).encode())
            return
        self.seen.append(path)
        time.sleep(self.latency_s)
        file = self.folder / path.removeprefix(f"/{BUCKET}/")
        if not file.is_file():
            self._send(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
            return
        size, ranged = file.stat().st_size, _RANGE.fullmatch(self.headers.get("Range", ""))
        start, end = _bounds(ranged, size) if ranged else (0, size)
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(end - start) if self.command == "GET" else b""
        more = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if ranged else {}
        self._send(206 if ranged else 200, data, end - start, more)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, data: bytes, length: int | None = None, more: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        fixed = {"Content-Length": str(len(data) if length is None else length), "ETag": '"x"'}
        for name, value in {**fixed, "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT", **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        begun = time.monotonic()
        for sent in range(0, len(data), _CHUNK):
            self.wfile.write(data[sent : sent + _CHUNK])
            ahead = min(sent + _CHUNK, len(data)) / self.bytes_per_s - (time.monotonic() - begun)
            if ahead > 0:
                time.sleep(ahead)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _bounds(match: re.Match[str], size: int) -> tuple[int, int]:
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _main(folder: str, latency_s: str, bytes_per_s: str) -> None:
    settings = {"folder": Path(folder), "latency_s": float(latency_s), "bytes_per_s": float(bytes_per_s), "seen": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), settings))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    _main(*sys.argv[1:])
