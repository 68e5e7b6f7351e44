"""How far a long run has come, and a warning when it makes no progress."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from cxr.errors import UserError
from cxr.runtime import console, metrics

T = TypeVar("T")
STALL_S = "CXR_STALL_WARNING_S"


@dataclass
class Progress:
    """Counts items: a live line on a terminal; elsewhere a line at most every `every_s` seconds.

    Args:
        what: name of the work, with which each line starts.
        total: items of the whole work.
        done: items that an earlier run finished.
        unit: unit of the counted items.
    """

    what: str
    total: int
    done: int = 0
    rejects: int = 0
    unit: str = "images"
    every_s: float = 5.0
    _started: float = field(default_factory=lambda: time.monotonic())
    _shown: float = field(default_factory=lambda: time.monotonic())
    _new: int = 0
    _seconds: Counter[str] = field(default_factory=Counter)
    _first: tuple[float, int] | None = None  # when the first items were done, and how many

    def add(self, count: int, rejects: int = 0, seconds: Mapping[str, float] | None = None) -> None:
        """Count `count` more items as done, `rejects` of them images without pixels.

        Args:
            seconds: what they took, by step; see `step_times`.
        """
        self._seconds.update(seconds or {})
        self.done += count
        self._new += count
        self.rejects += rejects
        if self.unit == "images":
            metrics.count_images(self.what, count, rejects)
            metrics.count_seconds(self.what, seconds or {})
        self._first = self._first or (time.monotonic(), self._new)
        self._show(due=time.monotonic() - self._shown >= self.every_s)

    def show(self) -> None:
        """Show a line now; at the end it says how long the work took."""
        self._show(due=True)

    def _show(self, due: bool) -> None:
        counts = {
            "what": self.what,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rejects": self.rejects,
        }
        if self.done < self.total and console.current().show_live_line(**counts):
            return
        if due:
            self._shown = time.monotonic()
            steps = {step: round(seconds, 3) for step, seconds in self._seconds.items()}
            console.event("progress", self.line(), **counts, seconds=round(self.seconds, 1), steps=steps)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def images_per_second(self) -> float:
        """Average of this run, including its start-up."""
        return self._new / max(self.seconds, 1e-9)

    @property
    def steady_images_per_second(self) -> float:
        """Average since the first images were done; 0 if all of them were done at once."""
        since, count = self._first or (0.0, self._new)
        return (self._new - count) / max(time.monotonic() - since, 1e-9)

    def line(self) -> str:
        text = f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({self.done / max(1, self.total):.0%})"
        if self.rejects:
            text += f", {self.rejects:,} rejected"
        if self._new and self.unit == "images":
            text += f", {self.images_per_second:.0f} images/s"
        return text + self._time_left()

    def _time_left(self) -> str:
        """Estimated from the pace since the first items: the start of a run says nothing about the rest."""
        if self.done >= self.total:
            return f", {duration(self.seconds)}{self._time_of_steps()}" if self._new else ""
        since, count = self._first or (0.0, self._new)
        if self._new == count:
            return ""
        left = (self.total - self.done) * (time.monotonic() - since) / (self._new - count)
        return f", {duration(left)} left"

    def _time_of_steps(self) -> str:
        """Such as "; an image took 12 ms of storage and 30 ms of decoding", in each process that worked on it."""
        steps = [f"{1000 * seconds / self._new:.0f} ms of {step}" for step, seconds in self._seconds.items()]
        return f"; an image took {', '.join(steps[:-1])}{' and ' * (len(steps) > 1)}{steps[-1]}" if steps else ""


def duration(seconds: float) -> str:
    """Such as "less than 1 s", "40 s", "2 min 03 s" or "3 h 10 min"."""
    if seconds < 1:
        return "less than 1 s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def with_stall_notes(items: Iterable[T], waiting_for: Callable[[], str]) -> Iterator[T]:
    """The items, with a note for every five minutes, or CXR_STALL_WARNING_S seconds, that the next one takes.

    A slow part and a wait for CPUs that others use look alike from here, so the work continues either way.

    Args:
        waiting_for: describes what is awaited and why that may take long; called in another thread.
    """
    watch = _StallWatch(_stall_s(), waiting_for)
    try:
        iterator = iter(items)
        while True:
            watch.waiting_since = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            watch.waiting_since = None
            yield item
    finally:
        watch.stop()


def _stall_s() -> float:
    text = os.environ.get(STALL_S) or "300"
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f"{STALL_S}={text}: expected seconds above 0; correct or unset it")


class _StallWatch:
    """A thread that shows a note while `waiting_since` is longer ago than `stall_s` seconds."""

    def __init__(self, stall_s: float, waiting_for: Callable[[], str]) -> None:
        self.waiting_since: float | None = None
        self._stall_s, self._waiting_for = stall_s, waiting_for
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        noted = 0.0
        while not self._stopped.wait(min(1.0, self._stall_s / 4)):
            since, now = self.waiting_since, time.monotonic()
            if since is not None and now - max(since, noted) >= self._stall_s:
                noted = now
                console.note(f"{duration(now - since)} without progress; waiting for {self._waiting_for()}")
