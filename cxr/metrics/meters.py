"""Meters: sums and counts that each worker collects, which are added over the workers and divided once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Communicator(Protocol):
    """The part of the worker group's interface that a meter needs; see `families.base.Communicator`."""

    def sum(self, values: Tensor) -> Tensor: ...
    def gather(self, rows: Tensor) -> Tensor: ...


class RankedCommunicator(Communicator, Protocol):
    """A communicator whose workers are numbered."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Mean:
    """The mean of all values of all workers, independent of batches and of each worker's share."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Count each row of `values` (B, ...) once."""
        total = values.detach().double().sum(0)
        self._total = total if self._total is None else self._total + total
        self._count += len(values)

    def over(self, workers: Communicator, like: Tensor) -> Tensor:
        """The mean over all workers, float64; NaN without values.

        `like` has its shape and device, for a worker without values.
        """
        total = torch.zeros_like(like, dtype=torch.float64) if self._total is None else self._total.to(like.device)
        message = torch.cat([total.flatten(), total.new_tensor([self._count])])
        summed = workers.sum(message)
        return (summed[:-1] / summed[-1]).reshape(like.shape)
