"""Random affine transforms, exposure and shading of image batches, on the training device.

Parameters of images are sampled on the CPU, with PyTorch's default generator if none is given, and copied
asynchronously, so that a GPU augments exactly as a CPU does. Only per-pixel noise is sampled on the device
(`pixel_noise`).
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
    max_zoom: float = 1.25,
    translate: float = 0.1,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, 2, 3) transforms for `spatial_transformer.warp`, float32.

    Rotation within ±rotation_deg; a zoom factor for each axis, log-uniform in [1/max_zoom, max_zoom]; translation
    within ±translate of the width. Sampled and computed on the CPU, then copied to `device`.
    """
    u = 2 * torch.rand(count, 5, generator=generator) - 1
    angle = math.radians(rotation_deg) * u[:, 0]
    sx, sy = torch.exp(math.log(max_zoom) * u[:, 1]), torch.exp(math.log(max_zoom) * u[:, 2])
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [sx * cos, -sy * sin, 2 * translate * u[:, 3], sx * sin, sy * cos, 2 * translate * u[:, 4]]
    return torch.stack(rows, 1).reshape(count, 2, 3).to(device, non_blocking=True)


def pixel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise with the shape and device of `like`; `generator` is used only on the CPU."""
    cpu_generator = generator if like.device.type == "cpu" else None
    return torch.randn(like.shape, device=like.device, generator=cpu_generator)


def random_exposure(
    x_BCHW: Tensor,
    *,
    gamma: float = 1.5,
    contrast: float = 0.3,
    brightness: float = 0.1,
    noise: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random exposure of images in [0, 1]: x -> c · x**g + b + noise, clamped to [0, 1].

    For each image, g is log-uniform in [1/gamma, gamma], c uniform in 1 ± contrast, b uniform within ±brightness;
    `noise` is the largest standard deviation of Gaussian noise.
    """
    u = 2 * torch.rand(4, len(x_BCHW), 1, 1, 1, generator=generator) - 1
    u = u.to(x_BCHW.device, non_blocking=True)
    x = x_BCHW.clamp(min=1e-4) ** torch.exp(math.log(gamma) * u[0]) * (1 + contrast * u[1]) + brightness * u[2]
    if noise > 0:
        x = x + noise * u[3].abs() * pixel_noise(x, generator)
    return x.clamp(0, 1)


def random_shading(x_BCHW: Tensor, *, depth: float = 0.12, blur: float = 1.0) -> Tensor:
    """Shade images in [0, 1] unevenly, by at most about `depth`, and blur them by up to `blur`, as other grids
    would."""
    device, count = x_BCHW.device, len(x_BCHW)
    coarse = torch.randn(count, 1, 4, 4).to(device, non_blocking=True)
    blur_amount, shade_amount = torch.rand(2, count, 1, 1, 1).to(device, non_blocking=True)
    shade = F.interpolate(coarse, x_BCHW.shape[-2:], mode="bicubic")
    blurred = F.avg_pool2d(x_BCHW, 3, 1, 1)
    return (x_BCHW + blur * blur_amount * (blurred - x_BCHW) + depth * shade_amount * shade).clamp(0, 1)


def random_plates(x_BCHW: Tensor, *, share: float = 0.5, largest: float = 0.3) -> Tensor:
    """Add a uniform rectangle to a fraction `share` of images in [0, 1], like labels, shutters or foreign objects.

    Its sides are up to `largest` of the image's sides; it may be partly outside the image.
    """
    device = x_BCHW.device
    u = torch.rand(6, len(x_BCHW), 1, 1, 1).to(device, non_blocking=True)
    height, width = x_BCHW.shape[-2:]
    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    inside = ((y - u[0]).abs() < largest / 2 * u[1]) & ((x - u[2]).abs() < largest / 2 * u[3]) & (u[4] < share)
    return torch.where(inside, u[5], x_BCHW)
