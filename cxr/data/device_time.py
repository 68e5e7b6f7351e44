"""How long a device computes: on a GPU, as the GPU measures it, while the host works ahead or waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTime:
    """Sums up the time of blocks that compute on a device, of which one runs at a time.

    On a GPU, a block lasts from when the device begins its first operation until it ends its last one. Nothing waits
    for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._running = deque[tuple[torch.cuda.Event, torch.cuda.Event]]()
        self._lock = threading.Lock()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of this block."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            with self._lock:
                self._seconds += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        with self._lock:
            self._running.append((begin, end))
            self._count_ended()

    def taken(self) -> float:
        """The seconds of the blocks that have ended, without those that were returned before."""
        with self._lock:
            self._count_ended()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _count_ended(self) -> None:
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
