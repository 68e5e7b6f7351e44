"""A process that decodes images for another one, so that a file which kills or hangs its decoder kills nothing else.

`cxr.data.decode_pool` starts it as `python -m cxr.data.decode_worker SOCKET MEMORY BYTES PARENT`: descriptors of a
socket and of a file in memory, the memory that this process may take, and the process that started it. Requests and
answers are lines of JSON on the socket:

    -> {"kind": "image", "bytes": 700123, "fit": 256}   the encoded file lies at the start of the memory
    <- {"needs": 12345678}                              bytes of memory, by its header, that decoding will take
    -> {}                                               they may be taken now
    <- {"height": 2048, "width": 2500, ...}             its pixels lie there now, resized to 256 x 256
    <- {"refused": "truncated PNG: ..."}                the file is no X-ray
    <- {"out_of_memory": true}                          this process should be replaced

Before its first request the process says {"ready": true}. It ends when the other side of the socket is closed.
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
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

import cv2
import numpy as np

from cxr.errors import ImageRejectedError, raised_at
from cxr.imaging import geometry
from cxr.imaging.decode import decode, inspect
from cxr.imaging.image import Image
from cxr.imaging.png_jpeg import decode_picture, inspect_picture

Kind = Literal["image", "mask"]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SharedMemory:
    """The start of a file in memory that two processes have mapped; only one of them uses it at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def view(self, size: int) -> memoryview:
        """The first `size` bytes, for which the file grows."""
        if size > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, size)
        if self._map is None or size > len(self._map):
            self._map = mmap.mmap(self.descriptor, max(1, size))
        return memoryview(self._map)[:size]

    def release(self) -> None:
        """Give the memory back to the system; views that were taken before must not be used again."""
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

            _send(channel, _answer(request["kind"], data, request["fit"], memory, wait_for_memory))


def _answer(
    kind: Kind, data: bytes, fit_px: int | None, memory: SharedMemory, wait_for_memory: Callable[[int], None]
) -> dict[str, Any]:
    """Decode `data` and leave its pixels in `memory`."""
    try:
        wait_for_memory((inspect if kind == "image" else inspect_picture)(data).memory_bytes)
        image = decode(data) if kind == "image" else Image(decode_picture(data))
        height, width = image.pixels.shape
        pixels = geometry.fit(image.pixels, fit_px)[0] if fit_px else image.pixels
        stored = np.frombuffer(memory.view(pixels.nbytes), pixels.dtype.newbyteorder("=")).reshape(pixels.shape)
        stored[:] = pixels
        about = {field.name: getattr(image, field.name) for field in fields(image) if field.name != "pixels"}
        return {"height": height, "width": width, "dtype": stored.dtype.name, "about": about}
    except ImageRejectedError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"out_of_memory": True}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a Rust library is no Exception
        return {"refused": f"unexpected {type(error).__name__}{raised_at(error)}"}


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _limit(limit_bytes: int) -> None:
    """Cap this process's own memory; what it shares with the other process is not counted."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's image


def _silence() -> None:
    """Discard what libraries print from here on: it may quote an image's header."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process with the one that started it, even in the middle of an endless loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in the meantime
        sys.exit()


if __name__ == "__main__":
    socket_, memory_, limit_, parent_ = map(int, sys.argv[1:])
    _end_with_parent(parent_)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, say, reaches all processes of a terminal
        signal.signal(number, signal.SIG_IGN)  # a file must not be blamed for it; the parent says when to end
    main(socket.socket(fileno=socket_), SharedMemory(memory_), limit_)
