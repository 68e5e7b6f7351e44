"""Positions of crops, and random crops are parts of the image."""

from __future__ import annotations

import torch

from cxr.augment.crops import corner_crops, random_crops, random_flips


def test_corner_crops_are_the_center_and_the_corners() -> None:
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    middle, *corners = corner_crops(x, 4)
    assert torch.equal(middle, x[..., 1:5, 1:5])
    assert [corner[0, 0, 0, 0].item() for corner in corners] == [0, 2, 12, 14]


def test_random_crops_are_parts_of_the_image_and_reach_every_position() -> None:
    x = torch.arange(25.0).reshape(1, 1, 5, 5).expand(200, 1, 5, 5)
    cuts = random_crops(x, 4, torch.Generator().manual_seed(0))
    assert cuts.shape == (200, 1, 4, 4)
    starts = set(cuts[:, 0, 0, 0].int().tolist())
    assert starts == {0, 1, 5, 6}
    assert all(torch.equal(cut - cut[0, 0], x[0, 0, :4, :4]) for cut in cuts[:, 0])


def test_a_full_size_crop_is_the_image() -> None:
    x = torch.rand(2, 1, 5, 5)
    assert random_crops(x, 5) is x


def test_about_the_given_fraction_is_mirrored() -> None:
    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.0]).expand(400, 1, 2, 2)
    mirrored = random_flips(x, 0.25)[:, 0, 0, 0].mean().item()
    assert 0.15 < mirrored < 0.35
