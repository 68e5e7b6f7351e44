"""The lung network: shapes, range, overlap."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cxr.models.small_unet import LARGEST_PX, LungField, soft_dice


@pytest.mark.parametrize("size", [32, 72, 128])
def test_any_size_gives_probabilities_of_that_size(size: int) -> None:
    field = LungField()(torch.randn(2, 1, size, size))
    assert field.shape == (2, 1, size, size)
    assert 0 <= field.min() < field.max() <= 1


def test_large_images_are_seen_at_the_largest_size_of_training() -> None:
    field, large = LungField().eval(), torch.rand(2, 1, 240, 3 * LARGEST_PX)
    reduced = F.interpolate(large, size=(80, LARGEST_PX), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(field(large), F.interpolate(field(reduced), size=(240, 480), mode="bilinear"))


def test_overlap_of_hand_made_maps() -> None:
    a = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]], [[[0.0, 0.0, 0.0, 0.0]]], [[[0.5, 0.0, 0.0, 0.0]]]])
    b = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(soft_dice(a, b), torch.tensor([2 / 3, 0.0, 0.8]), atol=1e-5, rtol=0)
    torch.testing.assert_close(soft_dice(a, a), torch.ones(3))
