"""What finds a mask: a segmentation network, and the rule by which its probabilities become a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cxr.models.smp_unet import Segmenter


class SegmentationModel(nn.Module):
    """X-rays (B, 1, H, W) in [0, 1] to mask logits (B, 1, H, W) and the image's logit (B,).

    Args:
        rule: (top, min_area, bottom) of `imaging.mask_rule.MaskRule`; kept as a buffer, since training chooses it.
    """

    rule: Tensor

    def __init__(self, segmenter: Segmenter, rule: Sequence[float]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.register_buffer("rule", torch.tensor(rule, dtype=torch.float64))

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        return self.segmenter(x_B1HW)

    def probabilities(self, x_B1HW: Tensor, *, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Of each pixel (B, H, W) and of the image (B,), float32; the mean over both sides with `mirrored`."""
        mask, image = (logits.sigmoid() for logits in self(x_B1HW))
        if mirrored:
            other, of_image = (logits.sigmoid() for logits in self(x_B1HW.flip(-1)))
            mask, image = (mask + other.flip(-1)) / 2, (image + of_image) / 2
        return mask[:, 0], image
