"""A small network that classifies images of 64 px: upright frontal chest, rotated chest, or something else.

It is trained here; `cxr.data.gate` applies it with NumPy, so that decoding does not import torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CHANNELS = (16, 32, 48, 64)


class GateNetwork(nn.Module):
    """Four strided convolutions and a linear layer.

    Args:
        size: height and width of the input in pixels, a multiple of 16.
        outputs: number of logits.
    """

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        widths = (1, *CHANNELS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in zip(widths, CHANNELS, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in CHANNELS)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(CHANNELS[-1] * (size // 16) ** 2, outputs)

    def forward(self, x_B1HW: Tensor) -> Tensor:
        """Logits (B, outputs) of standardized images (mean 0, standard deviation 1 each)."""
        x = x_B1HW
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x)).relu()
        return self.head(self.dropout(x.flatten(1)))

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The weights in evaluation mode, with batch normalization folded into the convolutions.

        Names: `convN.weight`, `convN.bias`, `head.weight`, `head.bias`.
        """
        state = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            fused = fuse_conv_bn_eval(convolution, norm)
            assert fused.bias is not None
            state |= {f"conv{number}.weight": fused.weight, f"conv{number}.bias": fused.bias}
        return {name: values.detach().cpu().contiguous() for name, values in state.items()}
