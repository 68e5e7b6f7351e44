"""A share of a process's memory that its threads use in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """So many bytes, which threads hold while they need them and wait for while others do.

    A thread must not ask for more of a budget that it holds some of: two such threads would wait for each other.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._free_bytes = total_bytes
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Wait until so many bytes are free. What is larger than the whole budget waits until all of it is."""
        size_bytes = min(size_bytes, self.total_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= size_bytes)
            self._free_bytes -= size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += size_bytes
                self._changed.notify_all()
