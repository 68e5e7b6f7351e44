"""Masks follow their images through every augmentation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.augment.affine_exposure import random_affine
from cxr.augment.image_mask import STILL, UNKNOWN, Variation, _random_grid, augment_with_masks, random_displacement
from cxr.data.batch import NO_MASK

SIZE = 96
MOVED = dataclasses.replace(Variation(), gamma=1, contrast=0, brightness=0, noise=0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(count: int) -> Tensor:
    """(count, 1, SIZE, SIZE) uint8: a disc above and to the right of the center."""
    at = torch.arange(SIZE)
    inside = (at[:, None] - 40).square() + (at - 60).square() < 20**2
    return inside.to(torch.uint8).expand(count, 1, -1, -1).contiguous()


def only(**changes: Any) -> Variation:
    return dataclasses.replace(STILL, **changes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "variation",
    [
        MOVED,
        only(flip=1),
        only(rotation_deg=30),
        only(max_zoom=1.5),
        only(translate=0.2),
        only(elastic=0.04),
        only(elastic=0.02, cells=12, flip=0.5),
    ],
)
def test_the_mask_follows_the_image(variation: Variation, dtype: torch.dtype) -> None:
    mask = disc(8).to(dtype)
    x = mask.float()
    moved, follows = augment_with_masks(x, mask, variation, seeded(0))
    assert follows.dtype == dtype
    assert set(follows.unique().tolist()) == {0, 1}
    torch.testing.assert_close((moved >= 0.5).float(), follows.float())
    changed = (follows != mask).flatten(1).float().mean(1)
    assert changed.max() > 0.01
    assert follows.flatten(1).sum(1).min() > 200  # the disc has 1256 pixels and is still visible


@pytest.mark.parametrize("elastic", [0.0, 0.02])
def test_sampling_positions_are_the_same_under_autocast(elastic: float) -> None:
    """Within 0.01 px at 512 px; the affine part is compared with float64."""
    variation = only(rotation_deg=10, max_zoom=1.1, translate=0.05, elastic=elastic)
    x = torch.zeros(4, 1, 512, 512)
    plain = _random_grid(x, variation, seeded(0))
    theta = random_affine(4, rotation_deg=10, max_zoom=1.1, translate=0.05, generator=seeded(0))
    exact = F.affine_grid(theta.double(), [4, 1, 512, 512], align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _random_grid(x, variation, seeded(0))
    assert torch.equal(plain, cast)
    if elastic == 0:
        assert (256 * (plain - exact)).abs().max() < 0.01
    else:
        assert (256 * (plain - exact)).abs().max() > 1


def test_no_variation_leaves_images_unchanged() -> None:
    x, mask = torch.rand(3, 1, 32, 32), disc(3)[..., :32, :32]
    same, follows = augment_with_masks(x, mask, STILL)
    assert torch.equal(same, x)
    assert torch.equal(follows, mask)
    warped, follows = augment_with_masks(x, mask, only(elastic=1e-9), seeded(1))  # not 0, so that it is sampled
    torch.testing.assert_close(warped, x, atol=1e-5, rtol=0)
    assert torch.equal(follows, mask)


def test_gray_values_change_and_masks_do_not() -> None:
    mask = disc(4)
    x = 0.3 + 0.4 * mask
    exposed, follows = augment_with_masks(x, mask, only(gamma=1.5, contrast=0.3, brightness=0.1), seeded(2))
    assert torch.equal(follows, mask)
    assert (exposed - x).abs().amax((1, 2, 3)).min() > 0.005
    assert 0 <= exposed.min() < exposed.max() <= 1
    grainy, _ = augment_with_masks(x, mask, only(noise=0.1), seeded(3))
    assert 0.005 < (grainy - x).std() < 0.1


def test_the_same_seed_gives_the_same_augmentation() -> None:
    x, mask = torch.rand(4, 1, SIZE, SIZE), disc(4)
    one, two, other = (augment_with_masks(x, mask, Variation(), seeded(s)) for s in (3, 3, 4))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert (one[0] - other[0]).abs().mean() > 0.01
    assert (one[0][0] - one[0][1]).abs().mean() > 0.01  # two images of a batch


def test_unknown_masks_stay_unknown_and_their_images_are_augmented() -> None:
    assert UNKNOWN == NO_MASK
    x, mask = torch.rand(4, 1, SIZE, SIZE), disc(4)
    mask[1] = UNKNOWN
    moved, follows = augment_with_masks(x, mask, Variation(), seeded(5))
    assert torch.equal(follows[1], mask[1])
    assert set(follows[[0, 2, 3]].unique().tolist()) == {0, 1}
    assert (moved[1] - x[1]).abs().mean() > 0.01


def test_the_given_fraction_is_flipped() -> None:
    mask = disc(400)[..., ::8, ::8].contiguous()
    _, follows = augment_with_masks(mask.float(), mask, only(flip=0.25), seeded(6))
    flipped = (follows != mask).flatten(1).any(1)
    assert 0.18 < flipped.float().mean() < 0.32
    assert torch.equal(follows[flipped], mask[flipped].flip(-1))


def test_displacement_is_smooth_has_unit_variance_and_is_zero_at_the_edges() -> None:
    field = random_displacement(torch.Size([200, 1, 64, 64]), 6, torch.device("cpu"), seeded(7))
    assert field.shape == (200, 64, 64, 2)
    assert 0.6 < field[:, 16:48, 16:48].std() < 1.1
    assert field[:, 0].abs().max() < 1e-5
    steps = (field[:, :, 1:] - field[:, :, :-1]).abs()
    assert steps.max() < 1.2  # a cell is 9 pixels wide


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"max_zoom": 0.5}, {"cells": 1}, {"noise": -1.0}])
def test_settings_out_of_range_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Variation(**wrong)  # pyright: ignore[reportArgumentType]
