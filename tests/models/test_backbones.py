"""Backbones: shapes, invariance to exposure, sensitivity to position."""

from __future__ import annotations

import pytest
import torch

from cxr.models.backbones import BACKBONES, BackboneName, local_mean, make_backbone, normalize_contrast


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_accept_any_size_and_propagate_gradients(name: BackboneName) -> None:
    network = make_backbone(name)
    features = network(torch.rand(2, 1, 72, 72))
    assert features.shape == (2, network.features)
    features.sum().backward()
    first = next(p for p in network.parameters() if p.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_names_give_the_number_of_blocks() -> None:
    assert [len(make_backbone(name).blocks) for name in BACKBONES[:4]] == [3, 4, 5, 6]


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match="conv3"):
        make_backbone("conv33")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["conv4", "conv6"])
def test_small_networks_do_not_mix_images_of_a_batch(name: BackboneName) -> None:
    network, x = make_backbone(name).train(), torch.rand(4, 1, 64, 64)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)


def test_features_depend_on_position() -> None:
    network = make_backbone("conv5")
    left, right = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    left[..., 10:30, 5:25] = 1
    right[..., 10:30, 37:57] = 1  # moved by a whole number of the deepest cells
    assert (network(left) - network(right)).abs().max() > 1e-3


def test_contrast_normalization_removes_exposure() -> None:
    x = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalize_contrast(x), normalize_contrast(0.5 * x + 0.3), atol=0.05, rtol=0)
    assert normalize_contrast(x).mean().abs() < 0.1
    assert normalize_contrast(x).std() == pytest.approx(1, abs=0.1)


def test_local_mean_ignores_what_is_outside_the_image() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    expected = torch.tensor([[2.0, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]])
    torch.testing.assert_close(local_mean(x, 3)[0, 0], expected)
