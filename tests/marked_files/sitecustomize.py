"""On PYTHONPATH, files that end with a mark do to their decoder process what real files have done to decoders.

Python imports this module at its start; it changes nothing in other processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path


def exits() -> None:
    os._exit(3)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> None:
    while True:
        time.sleep(1)


def fills_memory() -> None:
    held = []
    while True:
        held.append(bytes(range(256)) * (1 << 16))


def fails_once() -> None:
    """Without memory the first time, as on a busy machine."""
    met = Path(os.environ["MARKED_FILES_MET"])
    if not met.exists():
        met.touch()
        raise MemoryError


MARKS = {b"#" + action.__name__.encode(): action for action in (exits, crashes, hangs, fills_memory, fails_once)}

if "cxr.data.decode_worker" in sys.orig_argv:
    from cxr.imaging import decode

    unmarked = decode.inspect

    def marked(data: bytes) -> decode.EncodedImage:
        encoded = unmarked(data)

        def decode_pixels() -> decode.Image:
            for mark, action in MARKS.items():
                if data.endswith(mark):
                    action()
            return encoded.decode()

        return replace(encoded, decode=decode_pixels)

    decode.inspect = marked
