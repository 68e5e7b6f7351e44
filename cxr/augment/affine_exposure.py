"""Random variation of image batches, made on the device that trains.

What is drawn once per image comes from a generator of the CPU, PyTorch's own if none is given, and is moved without
waiting: a GPU varies images as the CPU does. Only noise of every pixel is drawn on the device (`pixel_noise`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_affine(
    count: int,
    *,
    rotation_deg: float = 15.0,
    scale: float = 1.25,
    shift: float = 0.1,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, 2, 3) transforms for `spatial_transformer.warp`, float32.

    Rotation within ±rotation_deg; two scales, each log-uniform within [1/scale, scale]; shifts within ±shift
    of the width. Drawn and computed on the CPU, then moved to `device`.
    """
    u = 2 * torch.rand(count, 5, generator=generator) - 1
    angle = math.radians(rotation_deg) * u[:, 0]
    sx, sy = torch.exp(math.log(scale) * u[:, 1]), torch.exp(math.log(scale) * u[:, 2])
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [sx * cos, -sy * sin, 2 * shift * u[:, 3], sx * sin, sy * cos, 2 * shift * u[:, 4]]
    return torch.stack(rows, 1).reshape(count, 2, 3).to(device, non_blocking=True)


def pixel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape of `like`, drawn on its device; `generator` is used on the CPU alone."""
    own = generator if like.device.type == "cpu" else None
    return torch.randn(like.shape, device=like.device, generator=own)


def random_exposure(
    x_BCHW: Tensor,
    *,
    gamma: float = 1.5,
    contrast: float = 0.3,
    brightness: float = 0.1,
    noise: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images in [0, 1] as another exposure might show them: x -> c · x**g + b + noise, within [0, 1].

    g is log-uniform within [1/gamma, gamma], c within 1 ± contrast, b within ±brightness, one each an image;
    `noise` is the largest standard deviation of Gaussian noise.
    """
    u = 2 * torch.rand(4, len(x_BCHW), 1, 1, 1, generator=generator) - 1
    u = u.to(x_BCHW.device, non_blocking=True)
    x = x_BCHW.clamp(min=1e-4) ** torch.exp(math.log(gamma) * u[0]) * (1 + contrast * u[1]) + brightness * u[2]
    if noise > 0:
        x = x + noise * u[3].abs() * pixel_noise(x, generator)
    return x.clamp(0, 1)


def random_shading(x_BCHW: Tensor, *, depth: float = 0.12, blur: float = 1.0) -> Tensor:
    """Images in [0, 1] shaded unevenly, by about `depth` at most, and blurred by up to `blur`: as other grids do."""
    device, count = x_BCHW.device, len(x_BCHW)
    coarse = torch.randn(count, 1, 4, 4).to(device, non_blocking=True)
    much, deep = torch.rand(2, count, 1, 1, 1).to(device, non_blocking=True)
    shade = F.interpolate(coarse, x_BCHW.shape[-2:], mode="bicubic")
    soft = F.avg_pool2d(x_BCHW, 3, 1, 1)
    return (x_BCHW + blur * much * (soft - x_BCHW) + depth * deep * shade).clamp(0, 1)


def random_plates(x_BCHW: Tensor, *, share: float = 0.5, largest: float = 0.3) -> Tensor:
    """Images in [0, 1], a `share` of which gets one even rectangle: labels, shutters, things in the way.

    Sides are up to `largest` of the image's; the rectangle may lie partly outside.
    """
    device = x_BCHW.device
    u = torch.rand(6, len(x_BCHW), 1, 1, 1).to(device, non_blocking=True)
    height, width = x_BCHW.shape[-2:]
    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    inside = ((y - u[0]).abs() < largest / 2 * u[1]) & ((x - u[2]).abs() < largest / 2 * u[3]) & (u[4] < share)
    return torch.where(inside, u[5], x_BCHW)
