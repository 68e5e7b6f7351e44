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
    _begun: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _new: int = 0

    def add(self, images: int, rejects: int = 0) -> None:
        """Note that `images` more are done, `rejects` of them without pixels."""
        self.done += images
        self._new += images
        self.rejects += rejects
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
        share = 100 * self.done / max(1, self.total)
        text = f"{self.what}: {self.done:,} of {self.total:,} images ({share:.0f} %), {self.rejects:,} rejected"
        if not self._new:
            return text
        left = (self.total - self.done) / self.images_per_second
        return f"{text}, {self.images_per_second:.0f} images/s, {_duration(left)} left"

    def tell(self) -> None:
        self._told = time.monotonic()
        print(self.line(), flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
