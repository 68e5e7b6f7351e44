"""Memory and processor time of this process and its descendants."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Self

_EVERY_S = 1.0  # each sample makes the kernel walk over all pages


class _Sampled(ABC):
    """Something of all these processes that is sampled within the `with` block, at its begin, and at its end."""

    def __init__(self) -> None:
        self._stop = Event()
        self._watch = Thread(target=self._sample_all, daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()
        self._sample()

    def _sample_all(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._sample()

    @abstractmethod
    def _sample(self) -> None: ...


class PeakMemory(_Sampled):
    """Peak proportional set size (shared pages count once) of all these processes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(_sizes()))


class ProcessorTime(_Sampled):
    """Seconds of processor time that all these processes use, except in their last second."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[tuple[int, str], int] = {}
        self._last: dict[tuple[int, str], int] = {}

    @property
    def seconds(self) -> float:
        return (sum(self._last.values()) - sum(self._first.values())) / os.sysconf("SC_CLK_TCK")

    def _sample(self) -> None:
        begins = not self._last
        for process in _family(os.getpid()):
            with suppress(OSError):
                values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                self._last[process, values[19]] = int(values[11]) + int(
                    values[12]
                )  # user and system; since its start
        if begins:
            self._first = dict(self._last)


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
