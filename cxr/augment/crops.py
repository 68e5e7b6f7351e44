"""Cuts out of batches of images, made on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops(x_BCHW: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """One random square of `size` pixels of each image; positions are drawn on the CPU, so nothing waits."""
    height, width = x_BCHW.shape[-2:]
    if (height, width) == (size, size):
        return x_BCHW
    tops = torch.randint(height - size + 1, (len(x_BCHW),), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (len(x_BCHW),), generator=generator).tolist()
    cuts = zip(x_BCHW, tops, lefts, strict=True)
    return torch.stack([x[:, top : top + size, left : left + size] for x, top, left in cuts])


def random_flips(x_BCHW: Tensor, share: float = 0.5) -> Tensor:
    """Images of which about a `share` is mirrored, left to right."""
    flipped = (torch.rand(len(x_BCHW), 1, 1, 1) < share).to(x_BCHW.device, non_blocking=True)
    return torch.where(flipped, x_BCHW.flip(-1), x_BCHW)


def corner_crops(x_BCHW: Tensor, size: int) -> list[Tensor]:
    """The middle and the four corners: squares of `size` pixels, (B, C, size, size) each."""
    height, width = x_BCHW.shape[-2:]
    down, right = height - size, width - size
    places = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
    return [x_BCHW[..., top : top + size, left : left + size] for top, left in places]
