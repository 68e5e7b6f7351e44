"""Grids and points match PyTorch's float64 results to 0.01 px, even under autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cxr.augment.affine_exposure import random_affine
from cxr.models.mil_loss import cells_inside
from cxr.models.spatial_transformer import compose, corner_distance, frame_distance, invert
from cxr.precision import affine_grid, affine_points, in_float32


@pytest.mark.parametrize("size", [512, 640, 1024])
def test_affine_grid_is_exact_to_a_hundredth_of_a_pixel_under_autocast(size: int) -> None:
    theta = random_affine(3, rotation_deg=30, max_zoom=1.5, translate=0.2, generator=torch.Generator().manual_seed(0))
    exact = F.affine_grid(theta.double(), [3, 1, size, size + 32], align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        grid, bfloat16_grid = (
            affine_grid(theta, size, size + 32),
            F.affine_grid(theta, [3, 1, size, size + 32], False),
        )
    assert grid.dtype == torch.float32
    half = torch.tensor([size + 32, size]) / 2  # pixels per unit of x and y
    assert ((grid - exact) * half).abs().max() < 0.01
    assert ((bfloat16_grid - exact) * half).abs().max() > 1, "F.affine_grid itself is inexact under autocast"


def test_affine_points_equals_a_float64_matrix_product() -> None:
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(4, 1, 2, 3, generator=generator)
    points = torch.randn(4, 7, 2, generator=generator)
    expected = points.double() @ theta[:, 0, :, :2].double().mT + theta[..., 2].double()
    with torch.autocast("cpu", torch.bfloat16):
        points_out = affine_points(theta, points)
    torch.testing.assert_close(points_out.double(), expected, rtol=1e-5, atol=1e-5)


def test_transform_algebra_is_the_same_under_autocast() -> None:
    a, b = (random_affine(5, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    boxes = torch.tensor([[[0, 0.21, 0.13, 0.77, 0.52]]])
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(
                (compose(a, b), invert(a), corner_distance(a, b), frame_distance(a, b), cells_inside(boxes, 2, 16))
            )
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_in_float32_casts_only_half_precision_arguments() -> None:
    @in_float32
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    x = torch.rand(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x.bfloat16(), b=x.half()).dtype == torch.float32
        assert product(x, x).dtype == torch.float32
        assert product(x.double(), x.double()).dtype == torch.float64
