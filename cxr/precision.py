"""Geometry in float32, even inside an autocast block.

bfloat16 has 8 bits of precision, which shifts a coordinate of a 640 px image by up to 2 px. Grids, corners and
transforms are therefore computed here as sums of products, not as matrix products, which autocast and TF32
(`torch.set_float32_matmul_precision`) would round. Only network layers may run at lower precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Disable autocast on `device` and on the CPU: operations keep the dtype of their inputs."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def in_float32(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: run `function` outside autocast, with float16 and bfloat16 arguments cast to float32.

    The first positional argument must be a tensor; its device is used.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, Tensor)
        with outside_autocast(first.device):
            values = (_at_least_float32(value) for value in args)
            named = {name: _at_least_float32(value) for name, value in kwargs.items()}
            return function(*values, **named)  # pyright: ignore[reportCallIssue]

    return run


def _at_least_float32(value: object) -> object:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value  # pyright: ignore[reportAttributeAccessIssue]


@in_float32
def affine_points(theta: Tensor, points: Tensor) -> Tensor:
    """Apply transforms (…, 2, 3) to points (…, 2), x before y; leading axes broadcast."""
    return (theta[..., :2] * points[..., None, :]).sum(-1) + theta[..., 2]


@in_float32
def affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Sampling grid (B, height, width, 2) for `F.grid_sample` from transforms (B, 2, 3).

    Equals `F.affine_grid` with align_corners=False, which uses a matrix product.
    """
    x_W, y_H = (
        (2 * torch.arange(count, device=theta.device, dtype=theta.dtype) + 1) / count - 1 for count in (width, height)
    )
    x_term_B2W = theta[:, :, 0, None] * x_W
    y_term_B2H = theta[:, :, 1, None] * y_H + theta[:, :, 2, None]
    return (x_term_B2W[:, :, None, :] + y_term_B2H[:, :, :, None]).permute(0, 2, 3, 1).contiguous()
