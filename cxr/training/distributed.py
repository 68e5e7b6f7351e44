"""The workers of one Ray Train run as a `families.base.Communicator`: exact sums and gathers over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """All processes of the default torch.distributed group, which Ray Train has set up."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def all_rows(self, rows: Tensor) -> Tensor:
        return _AllRows.apply(rows)  # pyright: ignore[reportReturnType]

    def gather(self, rows: Tensor) -> Tensor:
        lengths = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
        longest = int(max(lengths))
        if not longest:
            return rows
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


class _AllRows(torch.autograd.Function):
    """Rows of all workers. In the backward pass, a worker's rows get the sum of their gradients in all workers'
    losses."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        shares = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, rows.detach().contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.count :][: ctx.count]
