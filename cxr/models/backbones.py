"""Backbones for images of one or a few channels: small convolutional networks and torchvision's ResNets."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cxr.precision import in_float32

BackboneName = Literal["conv3", "conv4", "conv5", "conv6", "resnet18", "resnet34", "resnet50"]
BACKBONES: tuple[BackboneName, ...] = get_args(BackboneName)
Pooling = Literal["grid", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

WIDTHS = (16, 32, 64, 96, 128, 128)  # channels after each block of a small network
GRID = 4  # cells per side of features pooled to a grid, which keeps positions
GRID_FEATURES, MEAN_FEATURES = 128, 256


class Backbone(nn.Module):
    """Convolutions, then a hidden layer of `features` numbers.

    Args:
        blocks: (B, C, H, W) to (B, channels, h, w).
        pooling: the hidden layer sees a small grid of cells, or the mean, as in torchvision's classifiers.
    """

    def __init__(self, blocks: nn.Sequential, channels: int, pooling: Pooling = "grid") -> None:
        super().__init__()
        self.blocks = blocks
        if pooling == "grid":
            self.features = GRID_FEATURES
            self.squeeze = nn.Sequential(
                nn.Conv2d(channels, 64, 1), nn.GELU(), nn.AdaptiveAvgPool2d(GRID), nn.Flatten()
            )
            self.mix = nn.Sequential(nn.Linear(64 * GRID * GRID, GRID_FEATURES), nn.GELU())
        else:
            self.features = MEAN_FEATURES
            self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.mix = nn.Sequential(nn.Linear(channels, MEAN_FEATURES), nn.ReLU())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.mix(self.squeeze(self.blocks(x_BCHW)))


def make_backbone(name: BackboneName, channels: int = 1, pooling: Pooling = "grid") -> Backbone:
    """A backbone with random weights for images of `channels` channels.

    The layers of a ResNet have torchvision's names in `blocks`.

    Raises:
        ValueError: there is no such backbone.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name}")
    if name.startswith("conv"):
        depth = int(name.removeprefix("conv"))
        return Backbone(conv_blocks(depth, channels), WIDTHS[depth - 1], pooling)
    from torchvision import models as torchvision_models  # imported here because it takes seconds

    network = getattr(torchvision_models, name)(weights=None)
    network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    layers = {layer: child for layer, child in network.named_children() if layer not in ("avgpool", "fc")}
    return Backbone(nn.Sequential(OrderedDict(layers)), network.fc.in_features, pooling)


def conv_blocks(depth: int, channels: int = 1) -> nn.Sequential:
    """`depth` blocks, each of which halves the image."""
    ends = (channels, *WIDTHS[:depth])
    return nn.Sequential(*[conv_block(*pair, stride=2) for pair in pairwise(ends)])


def conv_block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm (which behaves the same in training and in use, for any batch size), GELU."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, channels_out), nn.GELU())


def normalize_contrast(x_BCHW: Tensor, window: float = 0.5) -> Tensor:
    """Subtract the local mean and divide by the local standard deviation, which removes exposure; float32.

    `window` is the side of the square neighborhood as a fraction of the image's height.
    """
    side = int(window * x_BCHW.shape[-2]) // 2 * 2 + 1
    x = x_BCHW.float()
    mean = local_mean(x, side)
    variance = local_mean((x - mean).square(), side)
    return (x - mean) / torch.sqrt(variance + 1e-3)


@in_float32
def local_mean(x_BCHW: Tensor, side: int) -> Tensor:
    """Mean over squares of `side` (odd) pixels, counting only pixels inside the image; float32.

    Computed as two matrix products: on CPUs this is ten times faster than pooling with large windows.
    """
    over_rows, over_columns = (_box_filter(n, side, x_BCHW.device) for n in x_BCHW.shape[-2:])
    return over_rows @ (x_BCHW @ over_columns.T)


def _box_filter(length: int, side: int, device: torch.device) -> Tensor:
    """(length, length) matrix whose row i averages the `side` entries around i."""
    index = torch.arange(length, device=device)
    inside = ((index[:, None] - index[None, :]).abs() <= side // 2).float()
    return inside / inside.sum(1, keepdim=True)
