"""Crops and flips of image batches, on the training device."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops(x_BCHW: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """A random square crop of `size` pixels from each image; positions are sampled on the CPU to avoid a device
    sync."""
    height, width = x_BCHW.shape[-2:]
    if (height, width) == (size, size):
        return x_BCHW
    tops = torch.randint(height - size + 1, (len(x_BCHW),), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (len(x_BCHW),), generator=generator).tolist()
    cuts = zip(x_BCHW, tops, lefts, strict=True)
    return torch.stack([x[:, top : top + size, left : left + size] for x, top, left in cuts])


def random_flips(x_BCHW: Tensor, share: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability `share`."""
    flipped = (torch.rand(len(x_BCHW), 1, 1, 1) < share).to(x_BCHW.device, non_blocking=True)
    return torch.where(flipped, x_BCHW.flip(-1), x_BCHW)


def corner_crops(x_BCHW: Tensor, size: int) -> list[Tensor]:
    """Center and corner crops of `size` pixels: five tensors (B, C, size, size)."""
    height, width = x_BCHW.shape[-2:]
    down, right = height - size, width - size
    corners = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
    return [x_BCHW[..., top : top + size, left : left + size] for top, left in corners]
