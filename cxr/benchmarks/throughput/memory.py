"""Memory and processor time of this process and its descendants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

_EVERY_S = 1.0  # each sample makes the kernel walk over all pages


class PeakMemory:
    """Peak proportional set size (shared pages count once) of all these processes within the `with` block."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = Event()
        self._watch = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, sum(_sizes()))
            if self._stop.wait(_EVERY_S):
                return


def cpu_seconds() -> float:
    """Seconds of processor time that all these processes have used, and those that have ended and were waited for."""
    ticks = 0
    for process in _family(os.getpid()):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _sizes() -> Iterator[int]:
    for process in _family(os.getpid()):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        yield from (int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _family(process: int) -> Iterator[int]:
    """The ids of a process and all its descendants."""
    yield process
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in listed.read_text().split():
                yield from _family(int(child))
