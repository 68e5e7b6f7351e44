"""Decoding in processes of their own: a file that kills, hangs or overfills its decoder costs one row.

Image decoders are C and C++ that run on files from anywhere. A crash, an endless loop or an allocation without end
inside one would otherwise take along the Ray worker, and with it every image of its part. Here the worker hands each
file to a child process (`cxr.data.decode_worker`), one at a time, with a limit on time and on memory, so that it
always knows which file is to blame. A file whose decoder failed is tried once more in a new process while nothing
else is decoded, since a busy machine may have been the reason; after that it is refused.

The files and the pixels travel through memory that both processes have mapped; 1,024 x 1,024 pixels cost 0.2 ms.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

import numpy as np

from cxr.data.decode_worker import Kind, SharedMemory
from cxr.data.memory_budget import MemoryBudget
from cxr.errors import ImageRejectedError, UserError
from cxr.imaging.image import Image

PROCESSES = 2  # for each Ray worker: while one's pixels are resized and stored, the other decodes
_START_S = 120.0  # a busy machine may need long to import OpenCV and pydicom; an idle one needs 1 s
_DECODING_BYTES = 1 << 30  # that the decoders of a pool may take together, by what the headers of images tell
_KEPT_BYTES = 64 << 20  # of shared memory that a process keeps between images
_LOCK = threading.Lock()


class DecoderUnavailableError(UserError):
    """No decoder process can run on this machine, which is not the fault of an image."""


class DecoderFailedError(RuntimeError):
    """A decoder process died, took too long or ran out of memory; the message says which."""


@dataclass(frozen=True)
class Limits:
    """What decoding one image may take."""

    seconds: float = 60.0
    memory_gib: float = 2.0

    @classmethod
    def from_environment(cls) -> Limits:
        """CXR_DECODE_SECONDS and CXR_DECODE_MEMORY_GIB, where they are set.

        Raises:
            UserError: one of them is not a positive number.
        """
        return cls(_positive("CXR_DECODE_SECONDS", cls.seconds), _positive("CXR_DECODE_MEMORY_GIB", cls.memory_gib))


def _positive(name: str, default: float) -> float:
    given = os.environ.get(name) or str(default)
    with suppress(ValueError):
        if float(given) > 0:
            return float(given)
    raise UserError(f"{name}={given}: expected a number above 0; correct or unset it")


@dataclass(frozen=True)
class Decoded:
    """An image as its file has it, or resized by `geometry.fit`, and the height and width of the original."""

    image: Image
    height: int
    width: int


def decode_image(data: bytes, fit_px: int | None = None) -> Decoded:
    """`cxr.imaging.decode.decode` in a process of its own.

    Args:
        fit_px: resize to this height and width there, which spares the original's pixels the way here.

    Raises:
        Refused: no X-ray can be had from it, or its decoder failed twice.
        DecoderUnavailableError: no process can be started.
    """
    return _shared().decode(data, "image", fit_px)


def decode_mask(data: bytes) -> np.ndarray:
    """`cxr.imaging.png_jpeg.decode_picture` in a process of its own; raises as `decode_image` does."""
    return _shared().decode(data, "mask").image.pixels


def _shared() -> DecodePool:
    """The pool of this process, which a fork of it must not use."""
    with _LOCK:
        return _of_process(os.getpid())


@cache
def _of_process(process: int) -> DecodePool:
    return DecodePool(Limits.from_environment())


class DecodePool:
    """A few decoder processes, started when they are first needed, that end with this process.

    May be used by several threads at once.
    """

    def __init__(self, limits: Limits | None = None, processes: int = PROCESSES) -> None:
        self._limits = limits or Limits()
        self._processes = processes
        self._budget = MemoryBudget(_DECODING_BYTES)
        self._slots = threading.Semaphore(processes)
        self._exclusive = threading.Lock()
        self._idle: list[_Decoder] = []
        self._known: dict[bytes, str] = {}  # digest of a file whose decoder failed -> reason; streams meet it again
        # The kernel ends the children with the thread that started them, so that one has to live on.
        self._starter = ThreadPoolExecutor(1, "start-decoder")

    def decode(self, data: bytes, kind: Kind, fit_px: int | None = None) -> Decoded:
        if self._known and (reason := self._known.get(_digest(data))):
            raise ImageRejectedError(reason)
        with suppress(DecoderFailedError), self._slots:
            return self._attempt(self._idle_one() or self._new(), data, kind, fit_px)
        with self._all_slots():
            try:
                return self._attempt(self._new(), data, kind, fit_px)
            except DecoderFailedError as failure:
                self._known[_digest(data)] = str(failure)
                raise ImageRejectedError(str(failure)) from None

    def close(self) -> None:
        """End the idle processes; new ones are started when they are needed."""
        while decoder := self._idle_one():
            decoder.close()

    def _attempt(self, decoder: _Decoder, data: bytes, kind: Kind, fit_px: int | None) -> Decoded:
        try:
            decoded = decoder.decode(data, kind, fit_px)
        except ImageRejectedError:
            self._keep(decoder)
            raise
        except OSError as error:
            decoder.close()
            raise _unavailable(error) from error
        except BaseException:  # after an interrupt as well: its answer would be taken for the next request's
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

    def _idle_one(self) -> _Decoder | None:
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
    """One process, which decodes one file at a time."""

    def __init__(self, limits: Limits, budget: MemoryBudget, starter: Executor) -> None:
        self._limits, self._budget = limits, budget
        try:
            self._memory = SharedMemory(_memory_file())
            self._channel, theirs = socket.socketpair()
            self._answers = self._channel.makefile("rb")
            with theirs, tempfile.TemporaryFile() as errors:
                self._process = starter.submit(_started, theirs, self._memory, limits, errors).result()
                theirs.close()  # else the end of the process would not show
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

    def decode(self, data: bytes, kind: Kind, fit_px: int | None) -> Decoded:
        """Raises Refused, or DecoderFailedError, after which this process is of no further use."""
        self._memory.view(len(data))[:] = data
        answer = self._ask({"kind": kind, "bytes": len(data), "fit": fit_px})
        if "needs" in answer:
            with self._budget.hold(answer["needs"]):
                answer = self._ask({})
        if "refused" in answer:
            raise ImageRejectedError(answer["refused"])
        if "out_of_memory" in answer:
            raise DecoderFailedError(f"decoding needed more than {self._limits.memory_gib:g} GiB of memory")
        height, width, dtype = answer["height"], answer["width"], np.dtype(answer["dtype"])
        shape = (fit_px, fit_px) if fit_px else (height, width)
        size = math.prod(shape) * dtype.itemsize
        pixels = np.frombuffer(self._memory.view(size), dtype).reshape(shape).copy()
        if max(size, len(data)) > _KEPT_BYTES:
            self._memory.release()
        about: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in answer["about"].items()}
        return Decoded(Image(pixels, **about), height, width)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._channel.close()
        os.close(self._memory.descriptor)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has died: what is received says so
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._answers.readline()
        except TimeoutError:
            raise DecoderFailedError(f"decoding took longer than {self._channel.gettimeout():g} s") from None
        except ConnectionResetError:
            line = b""
        if not line.endswith(b"\n"):
            raise DecoderFailedError(f"the decoder {self._end()}")
        return json.loads(line)

    def _end(self) -> str:
        """How the process ended: "was killed by signal 11 (SIGSEGV)"."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"exited with code {code}"
        with suppress(ValueError):
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"was killed by signal {-code}"


def _started(
    channel: socket.socket, memory: SharedMemory, limits: Limits, errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    """A decoder process that imports from where this one does, and writes to `errors` until it is ready."""
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
        f"no process that decodes images can run on {socket.gethostname()} ({reason}): check the memory there and "
        f"the limits on processes and open files, then run the same command again"
    )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
