"""Where the time of images goes: seconds that processes spend on each step of their work."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STORAGE, DECODING, NETWORKS = "storage", "decoding", "networks"
"""Steps: waiting for files; decoding, cropping, enhancing and resizing; computing predictions."""


class StepTimes:
    """Seconds by step, summed over the threads of a process."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = Counter[str](seconds or {})
        self._lock = threading.Lock()

    def add(self, step: str, seconds: float) -> None:
        with self._lock:
            self.seconds[step] += seconds  # pyright: ignore[reportArgumentType]

    @contextmanager
    def measured(self, step: str) -> Iterator[None]:
        """Count the time of this block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - start)

    def to_json(self) -> str:
        return json.dumps({step: round(seconds, 6) for step, seconds in self.seconds.items()})
