"""Trunks: shapes, indifference to exposure, memory for where something lies."""

from __future__ import annotations

import pytest
import torch

from cxr.models.backbones import TRUNKS, TrunkName, local_mean, normalise_contrast, trunk


@pytest.mark.parametrize("name", TRUNKS)
def test_every_trunk_reads_any_size_and_passes_gradients(name: TrunkName) -> None:
    network = trunk(name)
    features = network(torch.rand(2, 1, 72, 72))
    assert features.shape == (2, network.features)
    features.sum().backward()
    first = next(p for p in network.parameters() if p.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_deeper_nets_have_more_blocks() -> None:
    assert [len(trunk(name).blocks) for name in TRUNKS[:4]] == [3, 4, 5, 6]


def test_unknown_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="conv3"):
        trunk("conv33")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["conv4", "conv6"])
def test_batches_do_not_change_an_image_in_a_small_net(name: TrunkName) -> None:
    network, x = trunk(name).train(), torch.rand(4, 1, 64, 64)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)


def test_position_survives() -> None:
    network = trunk("conv5")
    left, right = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    left[..., 10:30, 5:25] = 1
    right[..., 10:30, 37:57] = 1  # moved by a whole number of the deepest cells
    assert (network(left) - network(right)).abs().max() > 1e-3


def test_contrast_normalisation_undoes_exposure() -> None:
    x = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise_contrast(x), normalise_contrast(0.5 * x + 0.3), atol=0.05, rtol=0)
    assert normalise_contrast(x).mean().abs() < 0.1
    assert normalise_contrast(x).std() == pytest.approx(1, abs=0.1)


def test_local_mean_counts_only_what_lies_inside() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    wanted = torch.tensor([[2.0, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]])
    torch.testing.assert_close(local_mean(x, 3)[0, 0], wanted)
