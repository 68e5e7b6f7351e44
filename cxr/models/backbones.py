"""Trunks that read images of one or a few channels: small conv nets and torchvision's ResNets."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cxr.precision import in_float32

TrunkName = Literal["conv3", "conv4", "conv5", "conv6", "resnet18", "resnet34", "resnet50"]
TRUNKS: tuple[TrunkName, ...] = get_args(TrunkName)

WIDTHS = (16, 32, 64, 96, 128, 128)  # channels after each block of a small net
GRID = 4  # cells to a side that the pooled output keeps: where something lies must survive


class Trunk(nn.Module):
    """Convolutions, then a small grid of cells flattened to `features` numbers.

    Args:
        blocks: (B, C, H, W) to (B, channels, h, w).
        features: length of the output.
    """

    def __init__(self, blocks: nn.Sequential, channels: int, features: int = 128) -> None:
        super().__init__()
        self.blocks = blocks
        self.squeeze = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.GELU(), nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
        self.mix = nn.Sequential(nn.Linear(64 * GRID * GRID, features), nn.GELU())
        self.features = features

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return self.mix(self.squeeze(self.blocks(x_B1HW)))


def trunk(name: TrunkName, channels: int = 1) -> Trunk:
    """A new trunk with random weights for images of `channels` channels.

    Raises:
        ValueError: no such trunk.
    """
    if name not in TRUNKS:
        raise ValueError(f"trunk {name!r}: wanted one of {', '.join(TRUNKS)}")
    if name.startswith("conv"):
        depth = int(name.removeprefix("conv"))
        return Trunk(conv_blocks(depth, channels), WIDTHS[depth - 1])
    from torchvision import models as torchvision_models  # here, for it takes seconds to import

    net = getattr(torchvision_models, name)(weights=None)
    net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return Trunk(nn.Sequential(*list(net.children())[:-2]), net.fc.in_features)


def conv_blocks(depth: int, channels: int = 1) -> nn.Sequential:
    """`depth` blocks, each halving the image."""
    ends = (channels, *WIDTHS[:depth])
    return nn.Sequential(*[conv_block(*pair, stride=2) for pair in pairwise(ends)])


def conv_block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm (the same in training as in use, for any batch), GELU."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, channels_out), nn.GELU())


def normalise_contrast(x_BCHW: Tensor, window: float = 0.5) -> Tensor:
    """Subtract the local mean and divide by the local deviation, so that exposure does not matter; float32.

    `window` is the side of the neighborhood as a share of the height.
    """
    side = int(window * x_BCHW.shape[-2]) // 2 * 2 + 1
    x = x_BCHW.float()
    mean = local_mean(x, side)
    variance = local_mean((x - mean).square(), side)
    return (x - mean) / torch.sqrt(variance + 1e-3)


@in_float32
def local_mean(x_BCHW: Tensor, side: int) -> Tensor:
    """Mean over squares of `side` (odd) pixels, over what of them lies inside the image; float32.

    As two matrix products: an order of magnitude faster on CPUs than pooling with large windows.
    """
    over_rows, over_columns = (_box(n, side, x_BCHW.device) for n in x_BCHW.shape[-2:])
    return over_rows @ (x_BCHW @ over_columns.T)


def _box(length: int, side: int, device: torch.device) -> Tensor:
    """(length, length): row i averages the `side` entries around i."""
    at = torch.arange(length, device=device)
    inside = ((at[:, None] - at[None, :]).abs() <= side // 2).float()
    return inside / inside.sum(1, keepdim=True)
