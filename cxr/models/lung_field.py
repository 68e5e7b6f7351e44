"""A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597) that finds the lung fields.

Encoder blocks are those of the small trunks, so that its features serve as a perceptual network too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import WIDTHS, conv_block, conv_blocks

DEPTH = 5


class LungField(nn.Module):
    """Contrast-normalised images (B, 1, H, W) to the probability that a pixel shows lung, (B, 1, H, W) in [0, 1].

    Lung means the visible field: without what heart, great vessels and diaphragm cover.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = WIDTHS[:DEPTH]
        self.down = conv_blocks(DEPTH)
        self.up = nn.ModuleList(
            conv_block(deep + shallow, shallow) for deep, shallow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, z_B1HW: Tensor) -> Tensor:
        return self.logits(z_B1HW).float().sigmoid()

    def logits(self, z_B1HW: Tensor) -> Tensor:
        """The same before the sigmoid."""
        return self.decoded(self.features(z_B1HW), z_B1HW.shape[-2:])

    def features(self, z_B1HW: Tensor) -> list[Tensor]:
        """What each block of the encoder gives, shallow to deep, each half as large as the one before."""
        x, features = z_B1HW, []
        for block in self.down:
            x = block(x)
            features.append(x)
        return features

    def decoded(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, 1, *size) from all `features`."""
        x = features[-1]
        for block, skip in zip(self.up, features[-2::-1], strict=True):
            x = block(torch.cat([_enlarged(x, skip.shape[-2:]), skip], 1))
        return _enlarged(self.out(x), size)


def soft_dice(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """(B,) overlap 2 Σab / (Σa² + Σb²) of two maps in [0, 1]; 1 only where they are equal. `b` may be one for all."""
    a, b = a_BCHW.float().flatten(1), b_BCHW.float().flatten(1)
    return (2 * (a * b).sum(1) + 1e-6) / (a.square().sum(1) + b.square().sum(1) + 1e-6)


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear")
