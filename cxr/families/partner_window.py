"""The images around a training step, of which a mosaic or mixup shows some beside the step's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cxr.data.batch import Batch

USABLE = "usable"  # column: whether a row may be drawn


class PartnerWindow:
    """A ring of rows on the training device: those of a step, of the steps before it and of those to come.

    A worker's share of a step may be one image or two. The window has as many rows however few that are: `ahead`
    reads an epoch's batches until it is full, and the last ones stay in it when the epoch ends. It starts anew with
    each epoch, so that what is drawn follows from the seed and the epoch: a resumed run draws what it would have.

    Args:
        size: rows, at least those of a batch; of an epoch with fewer, all are in the window.
        columns: what the window keeps of a batch; `USABLE` (B,) bool is one of them.
    """

    def __init__(self, size: int, columns: Callable[[Batch], Mapping[str, Tensor]]) -> None:
        self.size, self._columns = size, columns
        self._rows: dict[str, Tensor] = {}
        self._next = self._filled = 0
        self._reads_ahead = False

    def __len__(self) -> int:
        return self._filled

    def look_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each as soon as the window is full of its rows and of those that follow."""
        self._next = self._filled = 0
        self._reads_ahead = True
        waiting, rows = deque[Batch](), 0
        for batch in batches:
            waiting.append(batch)
            rows += self._add(batch)
            while rows >= self.size:
                rows -= _count(waiting[0])
                yield waiting.popleft()
        yield from waiting
        self._reads_ahead = False

    def show(self, batch: Batch) -> None:
        """Where `ahead` is not in use, make this batch the window: a step then depends on nothing else."""
        if not self._reads_ahead:
            self._next = self._filled = 0
            self._add(batch)

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` rows that are usable, drawn evenly and independently; any rows where none is usable.

        Draws from PyTorch's generator for the CPU and does not wait for the device.
        """
        usable = self._rows[USABLE][: self._filled]
        usable_first, usable_rows = torch.argsort(~usable, stable=True), usable.sum()
        drawn = torch.rand(count).to(usable.device, non_blocking=True)
        index = usable_first[torch.minimum((drawn * usable_rows).long(), usable_rows - 1).clamp(min=0)]
        return {name: values[index] for name, values in self._rows.items()}

    def _add(self, batch: Batch) -> int:
        """Put a batch in place of the oldest rows; returns how many rows it has."""
        count = _count(batch)
        assert count <= self.size, f"a batch of {count} in a window of {self.size}"
        first = min(count, self.size - self._next)  # the others go to the ring's beginning
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
