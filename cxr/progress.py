"""How far a long run has come: a line every few seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


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
