"""AE-CNN (Ranjan et al., ICVGIP 2018): an autoencoder that compresses X-rays, and a classifier of its latents.

A latent is an image, too: one channel in [0, 1], smaller by `factor` on each side, stored with 8 or 16 bits per
value.
Suffixes: B batch, H and W height and width of images, h and w of latents, F findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Codec(nn.Module):
    """Images (B, 1, H, W) to latents (B, 1, H / factor, W / factor) and back; neither is clipped."""

    factor: int

    def encode(self, x_B1HW: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, z_B1hw: Tensor) -> Tensor:
        raise NotImplementedError


class NoCodec(Codec):
    """The latent is the image."""

    factor = 1

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return x_B1HW

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return z_B1hw


class ResizeCodec(Codec):
    """Plain resizing: average pooling to encode, bicubic interpolation to decode."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return F.avg_pool2d(x_B1HW, self.factor)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return F.interpolate(z_B1hw, scale_factor=self.factor, mode="bicubic")


class PublishedCodec(Codec):
    """The network of the paper: three convolutions with 1,025 parameters, 16 pixels per value.

    It is initialized as resizing in one of its 32 channels; from random weights it takes far longer to get as good.
    As published, pixels beyond the border count as 0, which is visible at the border: it trains best on whole images.
    """

    factor = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 5, stride=4, padding=2), nn.ELU(), nn.Conv2d(32, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.PixelShuffle(4))
        _initialize_as_resizing(*(part for part in self.modules() if isinstance(part, nn.Conv2d)))

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return self.encoder(x_B1HW)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return self.decoder(z_B1hw)


class ResidualCodec(ResizeCodec):
    """Resizing plus corrections by two networks at the latent's resolution, which initially output zero.

    The latent remains an image that classifiers of resized X-rays can read, and carries in its fine detail what the
    decoder needs to sharpen it.

    Args:
        depth: number of convolutions with `width` channels in each direction, at least 1.
    """

    def __init__(self, factor: int, depth: int, width: int) -> None:
        super().__init__(factor)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(factor), *_convolutions(factor * factor, width, depth), _zero_convolution(width, 1)
        )
        self.decoder = nn.Sequential(
            *_convolutions(1, width, depth), _zero_convolution(width, factor * factor), nn.PixelShuffle(factor)
        )

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return super().encode(x_B1HW) + self.encoder(x_B1HW - 0.5)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return super().decode(z_B1hw) + self.decoder(z_B1hw - 0.5)


@torch.no_grad()
def _initialize_as_resizing(down: nn.Conv2d, mix: nn.Conv2d, up: nn.Conv2d) -> None:
    """Means of 4 x 4 pixels, and linear interpolation between their centers."""
    for layer in (mix, up):
        layer.weight.zero_()
        assert layer.bias is not None
        layer.bias.zero_()
    assert down.bias is not None
    down.bias[0] = 0
    down.weight[0] = 0
    down.weight[0, 0, 1:, 1:] = 1 / 16
    mix.weight[0, 0] = 1
    offset = (
        torch.arange(4) - 0.5
    ) / 4  # of a latent's pixels from the center of those it is the mean of, in latents
    weights = torch.stack([-offset, 1 - offset.abs(), offset], 1).clamp(
        min=0
    )  # of the previous latent, itself, the next
    up.weight[:, 0] = torch.einsum("ya,xb->yxab", weights, weights).flatten(0, 1)


def _convolutions(channels: int, width: int, depth: int) -> list[nn.Module]:
    ends = pairwise([channels, *[width] * depth])
    return [layer for a, b in ends for layer in (_convolution(a, b), nn.PReLU(b))]


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode="replicate")


def _zero_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A convolution that outputs zeros until it is trained."""
    layer = _convolution(channels_in, channels_out)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class AECNN(nn.Module):
    """A codec, and a classifier that sees only its latents.

    Args:
        classifier: latents (B, 1, h, w) in [0, 1] to logits (B, F).
        findings: names of the F outputs.
        bits: 8 or 16 bits per value of a latent; values are rounded to them in training, too.
    """

    thresholds: Tensor

    def __init__(self, codec: Codec, classifier: nn.Module, findings: Sequence[str], bits: int = 8) -> None:
        super().__init__()
        self.codec, self.classifier, self.findings, self.bits = codec, classifier, tuple(findings), bits
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5))  # set by the task's validation

    def encode(self, x_B1HW: Tensor) -> Tensor:
        """Latents as they are stored, float32: within [0, 1], in steps of 1 / (2**bits − 1)."""
        return stepped(clipped(self.codec.encode(x_B1HW).float()), self.bits)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        """Images in [0, 1] from latents, float32."""
        return clipped(self.codec.decode(z_B1hw).float())

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, F) and decoded images (B, 1, H, W) of images in [0, 1] whose sides `codec.factor` divides."""
        z = self.encode(x_B1HW)
        return self.classifier(z), self.decode(z)


def clipped(values: Tensor) -> Tensor:
    """Values clipped to [0, 1]; gradients pass unless they would drive a clipped value further outside."""
    return _Clip.apply(values)  # pyright: ignore[reportReturnType]


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(values)
        return values.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (values,) = ctx.saved_tensors
        outward = ((values < 0) & (gradient > 0)) | ((values > 1) & (gradient < 0))
        return gradient.masked_fill(outward, 0)


def stepped(values: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] rounded to 2**bits levels; gradients pass unchanged (straight-through)."""
    steps = 2**bits - 1
    return values + ((values * steps).round() / steps - values).detach()
