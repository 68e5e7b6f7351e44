"""How far a long run has come: a line every few seconds, and a warning when nothing comes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from cxr.errors import UserError

T = TypeVar("T")
STALL_S = "CXR_STALL_WARNING_S"


@dataclass
class Progress:
    """Counts images and prints a line at most every `every_s` seconds.

    Args:
        what: is said first in each line.
        total: images of the whole work.
        done: of them, those that an earlier run did.
    """

    what: str
    total: int
    done: int = 0
    rejects: int = 0
    every_s: float = 5.0
    _begun: float = field(default_factory=lambda: time.monotonic())
    _told: float = field(default_factory=lambda: time.monotonic())
    _new: int = 0
    _first: tuple[float, int] | None = None  # when the first images came, and how many

    def add(self, images: int, rejects: int = 0) -> None:
        """Note that `images` more are done, `rejects` of them without pixels."""
        self.done += images
        self._new += images
        self.rejects += rejects
        self._first = self._first or (time.monotonic(), self._new)
        if time.monotonic() - self._told >= self.every_s:
            self.tell()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def images_per_second(self) -> float:
        """Of this run, start-up included."""
        return self._new / max(self.seconds, 1e-9)

    def line(self) -> str:
        text = f"{self.what}: {self.done:,} of {self.total:,} images ({self.done / max(1, self.total):.0%})"
        if self.rejects:
            text += f", {self.rejects:,} rejected"
        if self._new:
            text += f", {self.images_per_second:.0f} images/s"
        return text + self._time_left()

    def _time_left(self) -> str:
        """At the pace since the first images came: the start of a run says nothing of the rest."""
        if self.done >= self.total:
            return f", {_duration(self.seconds)}" if self._new else ""
        since, images = self._first or (0.0, self._new)
        if self._new == images:
            return ""
        left = (self.total - self.done) * (time.monotonic() - since) / (self._new - images)
        return f", {_duration(left)} left"

    def tell(self) -> None:
        self._told = time.monotonic()
        print(self.line(), flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def warned(items: Iterable[T], waiting_for: Callable[[], str]) -> Iterator[T]:
    """The items, with a note for every five minutes, or CXR_STALL_WARNING_S seconds, that the next one takes.

    A slow part and a wait for CPUs that others use look alike from here, so the work goes on either way.

    Args:
        waiting_for: what is waited for and why that may take long; called in another thread.
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
    given = os.environ.get(STALL_S) or "300"
    with suppress(ValueError):
        if float(given) > 0:
            return float(given)
    raise UserError(f"{STALL_S}={given}: expected seconds above 0; correct or unset it")


class _StallWatch:
    """A thread that prints a note while `waiting_since` is longer ago than `stall_s` seconds."""

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
                print(
                    f"note: {_duration(now - since)} without progress; waiting for {self._waiting_for()}", flush=True
                )
