"""Geometry in float32, whatever autocast is in force around it.

bfloat16 has 8 bits of precision: a coordinate of a 640 px image is then off by up to 2 px. So grids, corners and
transforms are computed here, as sums of products and not as matrix products: autocast does not touch those, nor does
TF32 (`torch.set_float32_matmul_precision`). Only the layers of networks may run in fewer bits.
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
    """Operations on tensors of `device`, and of the CPU, keep the dtype of their input."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def in_float32(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: run `function` outside autocast, with float16 and bfloat16 arguments as float32.

    The device is that of the first positional argument, a tensor.
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
    short = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if short else value  # pyright: ignore[reportAttributeAccessIssue]


@in_float32
def affine_points(theta: Tensor, points: Tensor) -> Tensor:
    """Points (…, 2), x before y, moved by transforms (…, 2, 3); leading axes broadcast."""
    return (theta[..., :2] * points[..., None, :]).sum(-1) + theta[..., 2]


@in_float32
def affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Where `F.grid_sample` takes each output pixel from under transforms (B, 2, 3): (B, height, width, 2).

    The same as `F.affine_grid` with align_corners=False, which multiplies matrices.
    """
    x_W, y_H = (
        (2 * torch.arange(count, device=theta.device, dtype=theta.dtype) + 1) / count - 1 for count in (width, height)
    )
    of_x_B2W = theta[:, :, 0, None] * x_W
    of_y_B2H = theta[:, :, 1, None] * y_H + theta[:, :, 2, None]
    return (of_x_B2W[:, :, None, :] + of_y_B2H[:, :, :, None]).permute(0, 2, 3, 1).contiguous()
