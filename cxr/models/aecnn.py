"""AE-CNN (Ranjan et al., ICVGIP 2018): an autoencoder that compresses X-rays, and a classifier of its latents.

A latent is a picture too: one channel in [0, 1], smaller by `factor` to each side, kept with 8 or 16 bits a value.
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
    """What turns images (B, 1, H, W) into latents (B, 1, H / factor, W / factor) and back; neither is clipped."""

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
    """Plain resizing: means of squares on the way down, cubic interpolation on the way up."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return F.avg_pool2d(x_B1HW, self.factor)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return F.interpolate(z_B1hw, scale_factor=self.factor, mode="bicubic")


class PublishedCodec(Codec):
    """The network of the paper: three convolutions with 1,025 parameters, 16 pixels to a value.

    It begins as resizing, one channel of the 32; from random weights it takes far longer to come as near. Pixels
    beyond the border count as 0, as published, which shows: it learns best from whole images.
    """

    factor = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 5, stride=4, padding=2), nn.ELU(), nn.Conv2d(32, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.PixelShuffle(4))
        _begin_as_resizing(*(part for part in self.modules() if isinstance(part, nn.Conv2d)))

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return self.encoder(x_B1HW)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return self.decoder(z_B1hw)


class ResidualCodec(ResizeCodec):
    """Resizing, corrected in both directions by networks that work at the latent's size and begin as nothing.

    The latent stays a picture that classifiers of resized X-rays understand, and carries in its fine grain what the
    decoder needs to sharpen it.

    Args:
        depth: convolutions with `width` channels in each direction, 1 or more.
    """

    def __init__(self, factor: int, depth: int, width: int) -> None:
        super().__init__(factor)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(factor), *_convolutions(factor * factor, width, depth), _silent(width, 1)
        )
        self.decoder = nn.Sequential(
            *_convolutions(1, width, depth), _silent(width, factor * factor), nn.PixelShuffle(factor)
        )

    def encode(self, x_B1HW: Tensor) -> Tensor:
        return super().encode(x_B1HW) + self.encoder(x_B1HW - 0.5)

    def decode(self, z_B1hw: Tensor) -> Tensor:
        return super().decode(z_B1hw) + self.decoder(z_B1hw - 0.5)


@torch.no_grad()
def _begin_as_resizing(down: nn.Conv2d, mix: nn.Conv2d, up: nn.Conv2d) -> None:
    """Means of 4 x 4 pixels, and linear interpolation between their middles."""
    for layer in (mix, up):
        layer.weight.zero_()
        assert layer.bias is not None
        layer.bias.zero_()
    assert down.bias is not None
    down.bias[0] = 0
    down.weight[0] = 0
    down.weight[0, 0, 1:, 1:] = 1 / 16
    mix.weight[0, 0] = 1
    away = (torch.arange(4) - 0.5) / 4  # of a latent's pixels from the middle that it is the mean of, in latents
    shares = torch.stack([-away, 1 - away.abs(), away], 1).clamp(min=0)  # of the latent before, itself, the next
    up.weight[:, 0] = torch.einsum("ya,xb->yxab", shares, shares).flatten(0, 1)


def _convolutions(channels: int, width: int, depth: int) -> list[nn.Module]:
    ends = pairwise([channels, *[width] * depth])
    return [layer for a, b in ends for layer in (_convolution(a, b), nn.PReLU(b))]


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode="replicate")


def _silent(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A convolution that gives zeros until it is trained."""
    layer = _convolution(channels_in, channels_out)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class AECNN(nn.Module):
    """A codec, and a classifier that sees its latents only.

    Args:
        classifier: latents (B, 1, h, w) in [0, 1] to logits (B, F).
        findings: names of the F outputs.
        bits: of a latent's values, 8 or 16; they are rounded so in training already.
    """

    thresholds: Tensor

    def __init__(self, codec: Codec, classifier: nn.Module, findings: Sequence[str], bits: int = 8) -> None:
        super().__init__()
        self.codec, self.classifier, self.findings, self.bits = codec, classifier, tuple(findings), bits
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5))  # from validation, by its task

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
    """Values clipped to [0, 1]; what lies outside still learns its way back, and is not driven further away."""
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
    """Values in [0, 1] rounded to 2**bits steps; gradients pass as if they were not."""
    steps = 2**bits - 1
    return values + ((values * steps).round() / steps - values).detach()
