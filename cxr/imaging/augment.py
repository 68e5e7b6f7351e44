"""Random variation of image batches, made on the device that trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    of the width. `generator` must live on `device`.
    """
    u = 2 * torch.rand(count, 5, device=device, generator=generator) - 1
    angle = math.radians(rotation_deg) * u[:, 0]
    sx, sy = torch.exp(math.log(scale) * u[:, 1]), torch.exp(math.log(scale) * u[:, 2])
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [sx * cos, -sy * sin, 2 * shift * u[:, 3], sx * sin, sy * cos, 2 * shift * u[:, 4]]
    return torch.stack(rows, 1).reshape(count, 2, 3)


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
    device, count = x_BCHW.device, len(x_BCHW)
    u = 2 * torch.rand(4, count, 1, 1, 1, device=device, generator=generator) - 1
    x = x_BCHW.clamp(min=1e-4) ** torch.exp(math.log(gamma) * u[0]) * (1 + contrast * u[1]) + brightness * u[2]
    grain = torch.randn(x.shape, device=device, generator=generator)
    return (x + noise * u[3].abs() * grain).clamp(0, 1)
