"""A window of images around a training step, from which mosaic and mixup take partner images."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cxr.data.batch import Batch

PARTNERS = 64  # images, at least those of a step, from which a task draws partners
USABLE = "usable"  # column: whether a row may be a partner


class PartnerWindow:
    """A ring buffer of rows on the training device, from the current step and the steps before and after it.

    A worker's share of a step may be one or two images. The window has the same number of rows regardless:
    `look_ahead` reads the batches of an epoch until it is full, and the last rows stay until the epoch ends. It
    starts empty in each epoch, so the partners depend only on the seed and the epoch, also in a resumed run.

    Args:
        size: number of rows, at least those of a batch. If an epoch has fewer rows, the window contains all of them.
        columns: the columns of a batch that the window stores, including `USABLE`, (B,) bool.
    """

    def __init__(self, size: int, columns: Callable[[Batch], Mapping[str, Tensor]]) -> None:
        self.size, self._columns = size, columns
        self._rows: dict[str, Tensor] = {}
        self._next = self._filled = 0
        self._reads_ahead = False

    def __len__(self) -> int:
        return self._filled

    def batches_before(self, rows: int) -> int:
        """How many batches of `rows` rows before a step the window may contain: at the end of an epoch, all of
        them."""
        return math.ceil(self.size / rows)

    def look_ahead(self, batches: Iterator[Batch], skipped: int = 0) -> Iterator[Batch]:
        """The same batches. Each is returned after its rows and those that follow have filled the window.

        Args:
            skipped: number of batches of the epoch before these. The window is as if it had seen them from the batch
                number `batches_before` on.
        """
        self._next = self._filled = 0
        self._reads_ahead = True
        waiting, rows = deque[Batch](), 0
        for number, batch in enumerate(batches):
            if number == 0:
                self._next = skipped * _count(batch) % self.size
            waiting.append(batch)
            rows += self._add(batch)
            while rows >= self.size:
                rows -= _count(waiting[0])
                yield waiting.popleft()
        yield from waiting
        self._reads_ahead = False

    def show(self, batch: Batch) -> None:
        """Make this batch the whole window, unless `look_ahead` is in use: a step then depends on nothing else."""
        if not self._reads_ahead:
            self._next = self._filled = 0
            self._add(batch)

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` usable rows, sampled uniformly with replacement; any rows if none is usable.

        Draws from PyTorch's CPU generator and does not wait for the device.
        """
        usable = self._rows[USABLE][: self._filled]
        usable_first, usable_rows = torch.argsort(~usable, stable=True), usable.sum()
        sampled = torch.rand(count).to(usable.device, non_blocking=True)
        index = usable_first[torch.minimum((sampled * usable_rows).long(), usable_rows - 1).clamp(min=0)]
        return {name: values[index] for name, values in self._rows.items()}

    def _add(self, batch: Batch) -> int:
        """Replace the oldest rows by those of a batch; returns their number."""
        count = _count(batch)
        assert count <= self.size, f"a batch of {count} in a window of {self.size}"
        first = min(count, self.size - self._next)  # the others wrap around
        for name, values in self._columns(batch).items():
            ring = self._ring(name, values)
            ring[self._next : self._next + first] = values[:first]
            ring[: count - first] = values[first:]
        self._next = (self._next + count) % self.size
        self._filled = min(self.size, self._filled + count)
        return count

    def _ring(self, name: str, like: Tensor) -> Tensor:
        ring = self._rows.get(name)
        if ring is None or (ring.shape[1:], ring.dtype, ring.device) != (like.shape[1:], like.dtype, like.device):
            ring = self._rows[name] = like.new_zeros((self.size, *like.shape[1:]))
        return ring


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))
