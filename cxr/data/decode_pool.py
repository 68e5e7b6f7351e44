"""Decode images in child processes, so that a file that crashes, hangs or exhausts its decoder costs only one row.

Image decoders are C and C++ code that processes untrusted files. A crash, an endless loop or an unlimited allocation
would otherwise take down the Ray worker, and with it every image of its part. Each child process
(`cxr.data.decode_worker`) decodes one file at a time, with limits on time and memory, so that the file at fault is
always known. If a decoder fails, its file is tried once more in a new process while nothing else is decoded, because
a busy machine may have been the reason; then it is rejected.

Files and pixels are passed in shared memory; 1,024 x 1,024 pixels take 0.2 ms.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import IO, Any

import numpy as np

from cxr.data.decode_worker import Kind, SharedMemory
from cxr.data.memory_budget import MemoryBudget
from cxr.errors import ImageRejectedError, UserError
from cxr.imaging.image import Image

PROCESSES = 2  # per Ray worker: one decodes while the pixels of the other are resized and stored
_START_S = 120.0  # importing OpenCV and pydicom takes 1 s on an idle machine, much longer on a busy one
_DECODING_BYTES = 1 << 30  # memory for all decoders of a pool, as estimated from image headers
_RETAINED_BYTES = 64 << 20  # shared memory that a process retains between images
_LOCK = threading.Lock()


class DecoderUnavailableError(UserError):
    """Decoder processes cannot run on this machine, independently of the image."""


class DecoderFailedError(RuntimeError):
    """A decoder process died, took too long or ran out of memory; the message says which."""


@dataclass(frozen=True)
class Limits:
    """Limits for decoding an image."""

    seconds: float = 60.0
    memory_gib: float = 2.0

    @classmethod
    def from_environment(cls) -> Limits:
        """Read CXR_DECODE_SECONDS and CXR_DECODE_MEMORY_GIB, if they are set.

        Raises:
            UserError: one of them is not a positive number.
        """
        return cls(_positive("CXR_DECODE_SECONDS", cls.seconds), _positive("CXR_DECODE_MEMORY_GIB", cls.memory_gib))


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f"expected {name} to be a number above 0, got {text}: set it to such a number, or unset it")


@dataclass(frozen=True)
class Decoded:
    """An image at its original size, or resized by `geometry.fit`, and the height and width of the original."""

    image: Image
    height: int
    width: int
    waited_s: float = 0.0
    """Seconds for which the image waited for a free decoder."""
    fitted: dict[int, np.ndarray] = field(default_factory=dict)
    """The resized pixels by their height and width; `image` has the first of all sizes."""


def decode_image(data: bytes, *sizes: int | None) -> Decoded:
    """Run `cxr.imaging.reduced.decode_in_sizes` in a child process.

    Args:
        sizes: heights and widths to which the image is resized in the child, which avoids copying the original's
            pixels. The first may be None, for the image at its original size, which is also the default.

    Raises:
        ImageRejectedError: the file does not contain a usable X-ray, or its decoder failed twice.
        DecoderUnavailableError: no child process can be started.
    """
    return _shared().decode(data, "image", *sizes)


def decode_mask(data: bytes) -> np.ndarray:
    """Run `cxr.imaging.png_jpeg.decode_mask` in a child process; raises like `decode_image`."""
    return _shared().decode(data, "mask").image.pixels


def _shared() -> DecodePool:
    """The pool of this process; forked processes must not use it."""
    with _LOCK:
        return _of_process(os.getpid())


@cache
def _of_process(process: int) -> DecodePool:
    return DecodePool(Limits.from_environment())


class DecodePool:
    """A few decoder processes, which are started when they are first needed and end with this process.

    Thread-safe.
    """

    def __init__(self, limits: Limits | None = None, processes: int = PROCESSES) -> None:
        self._limits = limits or Limits()
        self._processes = processes
        self._budget = MemoryBudget(_DECODING_BYTES)
        self._slots = threading.Semaphore(processes)
        self._exclusive = threading.Lock()
        self._idle: list[_Decoder] = []
        self._failed: dict[
            bytes, str
        ] = {}  # digest of a file whose decoder failed -> reason; streams read files repeatedly
        # The kernel kills the children when the thread that started them ends, so this thread must live as long as
        # they.
        self._starter = ThreadPoolExecutor(1, "start-decoder")

    def decode(self, data: bytes, kind: Kind, *sizes: int | None) -> Decoded:
        sizes = sizes or (None,)
        if self._failed and (reason := self._failed.get(_digest(data))):
            raise ImageRejectedError(reason)
        start = time.perf_counter()
        with suppress(DecoderFailedError), self._slots:
            waited = time.perf_counter() - start
            return replace(self._attempt(self._pop_idle() or self._new(), data, kind, sizes), waited_s=waited)
        with self._all_slots():
            try:
                return self._attempt(self._new(), data, kind, sizes)
            except DecoderFailedError as failure:
                self._failed[_digest(data)] = str(failure)
                raise ImageRejectedError(str(failure)) from None

    def close(self) -> None:
        """Stop the idle processes; new ones are started when needed."""
        while decoder := self._pop_idle():
            decoder.close()

    def _attempt(self, decoder: _Decoder, data: bytes, kind: Kind, sizes: Sequence[int | None]) -> Decoded:
        try:
            decoded = decoder.decode(data, kind, sizes)
        except ImageRejectedError:
            self._keep(decoder)
            raise
        except OSError as error:
            decoder.close()
            raise _unavailable(error) from error
        except BaseException:  # interrupts included: the late response would be mistaken for that of the next request
            decoder.close()
            raise
        self._keep(decoder)
        return decoded

    def _new(self) -> _Decoder:
        return _Decoder(self._limits, self._budget, self._starter)

    def _keep(self, decoder: _Decoder) -> None:
        if len(self._idle) < self._processes:
            self._idle.append(decoder)
        else:
            decoder.close()

    def _pop_idle(self) -> _Decoder | None:
        with suppress(IndexError):
            return self._idle.pop()

    @contextmanager
    def _all_slots(self) -> Iterator[None]:
        with self._exclusive:
            for _ in range(self._processes):
                self._slots.acquire()
            try:
                yield
            finally:
                self._slots.release(self._processes)


class _Decoder:
    """A child process that decodes one file at a time."""

    def __init__(self, limits: Limits, budget: MemoryBudget, starter: Executor) -> None:
        self._limits, self._budget = limits, budget
        try:
            self._memory = SharedMemory(_memory_file())
            self._channel, theirs = socket.socketpair()
            self._responses = self._channel.makefile("rb")
            with theirs, tempfile.TemporaryFile() as errors:
                self._process = starter.submit(_start, theirs, self._memory, limits, errors).result()
                theirs.close()  # otherwise the end of the process would go unnoticed
                self._wait_until_ready(errors)
        except OSError as error:
            raise _unavailable(error) from error
        self._channel.settimeout(limits.seconds)

    def _wait_until_ready(self, errors: IO[bytes]) -> None:
        self._channel.settimeout(_START_S)
        try:
            self._receive()
        except DecoderFailedError as failure:
            self.close()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise _unavailable("; ".join([str(failure), *last])) from None

    def decode(self, data: bytes, kind: Kind, sizes: Sequence[int | None]) -> Decoded:
        """Decode a file. After a DecoderFailedError, this process is unusable."""
        self._memory.view(len(data))[:] = data
        response = self._ask({"kind": kind, "bytes": len(data), "sizes": list(sizes)})
        if "needs" in response:
            with self._budget.hold(response["needs"]):
                response = self._ask({})
        if "rejected" in response:
            raise ImageRejectedError(response["rejected"])
        if "out_of_memory" in response:
            raise DecoderFailedError(f"decoding needed more than {self._limits.memory_gib:g} GiB of memory")
        height, width, dtype = response["height"], response["width"], np.dtype(response["dtype"])
        shapes = [(size, size) if size else (height, width) for size in sizes]
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        total_bytes = ends[-1] * dtype.itemsize
        flat = np.frombuffer(self._memory.view(total_bytes), dtype).copy()
        if max(total_bytes, len(data)) > _RETAINED_BYTES:
            self._memory.release()
        pixels = [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
        info: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in response["about"].items()}
        fitted = {size: part for size, part in zip(sizes, pixels, strict=True) if size}
        return Decoded(Image(pixels[0], **info), height, width, fitted=fitted)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._responses.close()
        self._channel.close()
        os.close(self._memory.descriptor)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has died, which the next read reports
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._responses.readline()
        except TimeoutError:
            raise DecoderFailedError(f"decoding took longer than {self._channel.gettimeout():g} s") from None
        except ConnectionResetError:
            line = b""
        if not line.endswith(b"\n"):
            raise DecoderFailedError(f"the decoder {self._end()}")
        return json.loads(line)

    def _end(self) -> str:
        """How the process ended, for example "was killed by signal 11 (SIGSEGV)"."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"exited with code {code}"
        with suppress(ValueError):
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"was killed by signal {-code}"


def _start(
    channel: socket.socket, memory: SharedMemory, limits: Limits, errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a decoder process with the import path of this one, which writes to `errors` until it is ready."""
    numbers = [channel.fileno(), memory.descriptor, int(limits.memory_gib * 2**30), os.getpid()]
    paths = [*filter(None, [os.environ.get("PYTHONPATH"), *sys.path])]
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cxr.data.decode_worker", *map(str, numbers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=numbers[:2],
        env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def _memory_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("decoded")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _unavailable(reason: object) -> DecoderUnavailableError:
    return DecoderUnavailableError(
        f"image decoder processes cannot run on {socket.gethostname()} ({reason}): check its memory and its limits "
        f"on processes and open files, then run the same command again"
    )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
