"""The child process that decodes images for `cxr.data.decode_pool`, so that a bad file crashes nothing else.

It is started as `python -m cxr.data.decode_worker SOCKET MEMORY BYTES PARENT`: file descriptors of a socket and of
shared memory, the memory limit of this process, and the id of the parent process. Requests and responses are lines of
JSON:

    -> {"kind": "image", "bytes": 700123, "sizes": [null, 256]}  the encoded file is at the start of the shared memory
    <- {"needs": 12345678}                   bytes of memory that decoding needs, according to the header
    -> {}                                    the memory may be used now
    <- {"height": 2048, "width": 2500, ...}  the pixels are in the shared memory: original, then 256 x 256
    <- {"rejected": "truncated PNG: ..."}    the file does not contain a usable X-ray
    <- {"out_of_memory": true}               this process should be replaced

Before the first request, the process sends {"ready": true}. It ends when the other side of the socket is closed.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import cv2
import numpy as np

from cxr.errors import ImageRejectedError, raised_at
from cxr.imaging.decode import inspect
from cxr.imaging.image import require_memory
from cxr.imaging.png_jpeg import inspect_mask
from cxr.imaging.reduced import decode_in_sizes

Kind = Literal["image", "mask"]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SharedMemory:
    """Memory mapped by two processes, only one of which uses it at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def view(self, size: int) -> memoryview:
        """The first `size` bytes; the file grows if necessary."""
        if size > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, size)
        if self._map is None or size > len(self._map):
            self._map = mmap.mmap(self.descriptor, max(1, size))
        return memoryview(self._map)[:size]

    def release(self) -> None:
        """Return the memory to the system; existing views must not be used any more."""
        os.ftruncate(self.descriptor, 0)


def main(channel: socket.socket, memory: SharedMemory, limit_bytes: int) -> None:
    _limit(limit_bytes)
    cv2.setNumThreads(0)
    with channel, channel.makefile("rb") as requests:
        _send(channel, {"ready": True})
        _silence()
        for line in requests:
            request = json.loads(line)
            data = bytes(memory.view(request["bytes"]))

            def wait_for_memory(needed: int) -> None:
                _send(channel, {"needs": needed})
                requests.readline()

            _send(channel, _respond(request["kind"], data, request["sizes"], memory, wait_for_memory))


def _respond(
    kind: Kind,
    data: bytes,
    sizes: Sequence[int | None],
    memory: SharedMemory,
    wait_for_memory: Callable[[int], None],
) -> dict[str, Any]:
    """Decode `data` into `memory` and return the response."""
    try:
        encoded = inspect(data) if kind == "image" else inspect_mask(data)
        wait_for_memory(encoded.memory_bytes)
        if kind == "mask":
            require_memory(encoded.memory_bytes)
        images = decode_in_sizes(encoded, sizes)
        first = images[0]
        height, width = first.pixels.shape if sizes[0] is None else (encoded.height, encoded.width)
        dtype = first.pixels.dtype.newbyteorder("=")
        flat = np.frombuffer(memory.view(sum(image.pixels.size for image in images) * dtype.itemsize), dtype)
        for image in images:
            assert image.pixels.dtype == first.pixels.dtype
            flat[: image.pixels.size] = image.pixels.reshape(-1)
            flat = flat[image.pixels.size :]
        info = {field.name: getattr(first, field.name) for field in fields(first) if field.name != "pixels"}
        return {"height": height, "width": width, "dtype": dtype.name, "about": info}
    except ImageRejectedError as error:
        return {"rejected": str(error)}
    except MemoryError:
        return {"out_of_memory": True}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a Rust library is not an Exception
        return {"rejected": f"unexpected {type(error).__name__}{raised_at(error)}"}


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _limit(limit_bytes: int) -> None:
    """Limit this process's own memory; shared memory is not counted."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would contain a patient's image


def _silence() -> None:
    """Discard all further output of libraries, which may quote an image's header."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _end_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent ends, even inside an endless loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        sys.exit()


if __name__ == "__main__":
    socket_, memory_, limit_, parent_ = map(int, sys.argv[1:])
    _end_with_parent(parent_)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches all processes of a terminal
        signal.signal(number, signal.SIG_IGN)  # the parent stops this process; a file must not be blamed
    main(socket.socket(fileno=socket_), SharedMemory(memory_), limit_)
