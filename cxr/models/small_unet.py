"""Small U-Nets (Ronneberger et al. 2015, arXiv 1505.04597): one for the lung fields, and the body of others.

Their encoder has the blocks of the small backbones, so that its features can serve as a perceptual network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import WIDTHS, conv_block, conv_blocks

DEPTH = 5
LARGEST_PX = 160  # at which lung networks are trained


class SmallUNetBody(nn.Module):
    """Contrast-normalized images (B, 1, H, W) to features (B, WIDTHS[0], H / 2, W / 2) with large receptive fields.

    Args:
        deep: add a residual block of two convolutions at every level with a quarter of the resolution or less.
    """

    def __init__(self, *, deep: bool = False) -> None:
        super().__init__()
        widths = WIDTHS[:DEPTH]
        self.down = conv_blocks(DEPTH)
        self.up = nn.ModuleList(
            conv_block(low + high, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        if deep:
            for block, width in zip([*self.down[1:], *self.up[:-1]], [*widths[1:], *widths[-2:0:-1]], strict=True):
                block.append(ResidualBlock(width))  # pyright: ignore[reportCallIssue]

    def encode(self, z_B1HW: Tensor) -> list[Tensor]:
        """The output of each encoder block, shallow to deep, each half the size of the one before."""
        return encode(self.down, z_B1HW)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The decoder's output for the features of all encoder blocks."""
        x = features[-1]
        for block, skip in zip(self.up, features[-2::-1], strict=True):
            x = block(torch.cat([upsample(x, skip.shape[-2:]), skip], 1))
        return x


class ResidualBlock(nn.Module):
    """The input plus two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.blocks(x_BCHW)


class LungField(nn.Module):
    """Contrast-normalized images (B, 1, H, W) to the probability that a pixel shows lung, (B, 1, H, W) in [0, 1].

    Lung means the visible field, without the parts behind the heart, the great vessels and the diaphragm.

    Images with a side of more than `LARGEST_PX` are reduced first, and the map is enlarged, since the network knows
    lungs of the sizes on which it was trained.

    The decoder adds features of two levels instead of concatenating them, which takes a third of the multiplications
    of `SmallUNetBody`. The weights are in channels-last order, in which CPUs take two thirds of the time.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = WIDTHS[:DEPTH]
        self.down = conv_blocks(DEPTH)
        self.project = nn.ModuleList(
            nn.Conv2d(low, high, 1) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.up = nn.ModuleList(conv_block(width, width) for width in widths[-2::-1])
        self.out = nn.Conv2d(widths[0], 1, 1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, z_B1HW: Tensor) -> Tensor:
        shape = z_B1HW.shape[-2:]
        if max(shape) > LARGEST_PX:
            reduced = [max(1, round(side * LARGEST_PX / max(shape))) for side in shape]
            z_B1HW = F.interpolate(z_B1HW, size=reduced, mode="bilinear", antialias=True)
        return upsample(self.logits(z_B1HW).float().sigmoid(), shape)

    def logits(self, z_B1HW: Tensor) -> Tensor:
        x, *skips = reversed(encode(self.down, z_B1HW))
        for project, block, skip in zip(self.project, self.up, skips, strict=True):
            x = block(upsample(project(x), skip.shape[-2:]) + skip)
        return upsample(self.out(x), z_B1HW.shape[-2:])


def encode(down: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The output of each encoder block, shallow to deep."""
    features = []
    for block in down:
        x = block(x)
        features.append(x)
    return features


def soft_dice(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """(B,) overlap 2 Σab / (Σa² + Σb²) of two maps in [0, 1]; 1 only if they are equal. `b` may be one map for
    all."""
    a, b = a_BCHW.float().flatten(1), b_BCHW.float().flatten(1)
    return (2 * (a * b).sum(1) + 1e-6) / (a.square().sum(1) + b.square().sum(1) + 1e-6)


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear")
