"""The transform algebra, the bounds, and the spatial transformer's first guess."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cxr.augment.affine_exposure import random_affine
from cxr.models.backbones import make_backbone
from cxr.models.spatial_transformer import (
    PARAMETERS,
    Parameterization,
    SpatialTransformer,
    bounded_theta,
    compose,
    corner_distance,
    frame_distance,
    identity,
    invert,
    warp,
)

NAMES: list[Parameterization] = list(PARAMETERS)


def some_affines(count: int = 6, seed: int = 0) -> Tensor:
    return random_affine(count, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, size: int = 64) -> Tensor:
    noise = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("parameterization", NAMES)
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_new_network_is_the_identity(parameterization: Parameterization, iterations: int) -> None:
    network = SpatialTransformer(make_backbone("conv3"), parameterization, iterations)
    theta = network(torch.rand(3, 1, 32, 32))
    torch.testing.assert_close(theta, identity(3))


@pytest.mark.parametrize("parameterization", NAMES)
def test_parameters_stay_in_their_bounds_and_never_mirror(parameterization: Parameterization) -> None:
    raw = 50 * torch.randn(500, PARAMETERS[parameterization], generator=torch.Generator().manual_seed(0))
    theta = bounded_theta(raw, parameterization)
    assert theta[..., 2].abs().max() <= 0.5
    x_scale = torch.linalg.vector_norm(theta[:, :, 0], dim=1)
    assert x_scale.min() >= 0.5 - 1e-5
    assert x_scale.max() <= 2 + 1e-5
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0])
    assert angle.abs().max() <= math.radians(30) + 1e-5
    assert torch.linalg.det(theta[..., :2]).min() >= 0.25 - 1e-5


def test_the_anisotropic_matrix_has_the_documented_form() -> None:
    raw = torch.tensor([[0.1, -0.2, 0.3, 0.4, -0.5]])
    t = torch.tanh(raw[0])
    a, sx, sy = math.radians(30) * t[2], 2 ** t[3], 2 ** t[4]
    wanted = [
        [sx * torch.cos(a), -sy * torch.sin(a), 0.5 * t[0]],
        [sx * torch.sin(a), sy * torch.cos(a), 0.5 * t[1]],
    ]
    torch.testing.assert_close(bounded_theta(raw, "anisotropic")[0], torch.tensor(wanted))


def test_similarity_keeps_angles_and_affine_can_shear() -> None:
    raw = torch.full((1, 6), 0.7)
    axes = bounded_theta(raw[:, :4], "similarity")[0, :, :2]
    torch.testing.assert_close(axes.T @ axes, axes[:, 0].square().sum() * torch.eye(2))
    sheared = bounded_theta(raw, "affine")[0, :, :2]
    assert (sheared[:, 0] @ sheared[:, 1]).abs() > 0.1


def test_composition_is_the_matrix_product_and_inversion_undoes() -> None:
    a, b = some_affines(seed=1), some_affines(seed=2)
    below = torch.tensor([0.0, 0, 1]).expand(6, 1, 3)
    product = torch.cat([a, below], 1) @ torch.cat([b, below], 1)
    torch.testing.assert_close(compose(a, b), product[:, :2])
    torch.testing.assert_close(compose(a, invert(a)), identity(6))
    torch.testing.assert_close(compose(invert(a), a), identity(6))


def test_warping_twice_is_warping_once_by_the_composition() -> None:
    x, a, b = smooth_images(6), some_affines(seed=1), some_affines(seed=2)
    twice, once = warp(warp(x, a), b), warp(x, compose(a, b))
    inside = warp(warp(torch.ones_like(x), a), b) > 0.999
    assert inside.float().mean() > 0.5
    assert (twice - once)[inside].abs().mean() < 0.01


def test_a_shift_of_a_quarter_moves_pixels_by_a_quarter_of_the_width() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 5] = 1
    shifted = warp(x, torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]]))
    assert shifted[0, 0, 3, 3] == pytest.approx(1)
    assert shifted.sum() == pytest.approx(1)


def test_corner_distance_of_a_shift_is_its_share_of_the_width() -> None:
    moved = identity()
    moved[0, 0, 2] = 0.2  # of a width of 2
    assert corner_distance(moved, identity()).item() == pytest.approx(0.1, abs=1e-5)


def test_frame_distance_ignores_the_choice_of_frame() -> None:
    a, b = some_affines(seed=1), some_affines(seed=2)
    zoom = torch.tensor([[[0.1, 0, 0.3], [0, 0.1, 0]]]).expand(6, 2, 3)
    plain = frame_distance(a, b)
    assert plain.min() > 0.01
    torch.testing.assert_close(frame_distance(compose(a, zoom), compose(b, zoom)), plain, rtol=1e-3, atol=1e-5)


def test_a_network_that_undoes_every_warp_has_no_frame_distance() -> None:
    pose, warps = some_affines(seed=3), some_affines(seed=4)
    found_after_warp = compose(invert(warps), pose)
    assert frame_distance(compose(warps, found_after_warp), pose).max() < 1e-4


class ShiftOnce(nn.Module):
    """A backbone whose single feature requests the same shift in x for every image."""

    features = 1

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return x_B1HW.new_ones(len(x_B1HW), 1)


def test_two_iterations_compose_their_transforms() -> None:
    network = SpatialTransformer(ShiftOnce(), "similarity", iterations=2)
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.5, 0, 0, 0.5]))
    one = bounded_theta(torch.tensor([[0.5, 0, 0, 0.5]]), "similarity")
    torch.testing.assert_close(network(torch.rand(1, 1, 16, 16)), compose(one, one))


class Recorded(ShiftOnce):
    """Keeps its last input."""

    def forward(self, x_B1HW: Tensor) -> Tensor:
        self.seen = x_B1HW
        return super().forward(x_B1HW)


def test_a_reduction_keeps_the_area_of_the_lungs() -> None:
    lungs = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    network = SpatialTransformer(Recorded(), lungs=MapOf(lungs), reduction=4)
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 2, 3)
    seen = network.backbone.seen
    assert isinstance(seen, Tensor)
    assert seen.shape == (2, 2, 8, 8)
    torch.testing.assert_close(seen[:, 1].mean((1, 2)), lungs[:, 0].mean((1, 2)))


class MapOf(nn.Module):
    """Knows the lung fields."""

    def __init__(self, lungs: Tensor) -> None:
        super().__init__()
        self.lungs = lungs

    def forward(self, z_B1HW: Tensor) -> Tensor:
        return self.lungs


def test_transforms_are_float32_under_autocast() -> None:
    network = SpatialTransformer(make_backbone("conv3"), "affine", iterations=2)
    x = torch.rand(2, 1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        theta = network(x)
        assert theta.dtype == warp(x, theta).dtype == torch.float32
        a, b = some_affines(seed=1), some_affines(seed=2)
        torch.testing.assert_close(compose(a, invert(a)), identity(6))
        assert corner_distance(a, b).dtype == torch.float32


def test_unknown_parameterization_is_rejected() -> None:
    with pytest.raises(ValueError, match="anisotropic"):
        SpatialTransformer(make_backbone("conv3"), "projective")  # pyright: ignore[reportArgumentType]
