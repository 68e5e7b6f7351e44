"""A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597) that finds the lung fields.

Encoder blocks are those of the small trunks, so that its features serve as a perceptual network too.
"""

from __future__ import annotations

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
        x, skips = z_B1HW, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([_enlarged(x, skip), skip], 1))
        return _enlarged(self.out(x), z_B1HW)


def soft_dice(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """(B,) overlap 2 Σab / (Σa² + Σb²) of two maps in [0, 1]; 1 only where they are equal. `b` may be one for all."""
    a, b = a_BCHW.float().flatten(1), b_BCHW.float().flatten(1)
    return (2 * (a * b).sum(1) + 1e-6) / (a.square().sum(1) + b.square().sum(1) + 1e-6)


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")
