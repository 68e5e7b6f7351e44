"""Random augmentation stays within its bounds, fills them, and is reproducible."""

from __future__ import annotations

import math

import torch

from cxr.augment.affine_exposure import random_affine, random_exposure, random_plates, random_shading


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_affines_fill_their_bounds() -> None:
    theta = random_affine(4000, rotation_deg=20, max_zoom=1.5, translate=0.1, generator=seeded(0))
    angle = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    scales = torch.linalg.vector_norm(theta[:, :, :2], dim=1)
    for values, low, high in ((angle, -20, 20), (scales.log(), -math.log(1.5), math.log(1.5))):
        assert low * 1.001 <= values.min() < 0.98 * low
        assert 0.98 * high < values.max() <= 1.001 * high
    assert 0.19 < theta[..., 2].abs().max() <= 0.2  # a tenth of the width, which is 2


def test_the_same_seed_gives_the_same_augmentation() -> None:
    torch.testing.assert_close(random_affine(3, generator=seeded(1)), random_affine(3, generator=seeded(1)))
    x = torch.rand(3, 1, 8, 8, generator=seeded(2))
    one, two, other = (random_exposure(x, generator=seeded(s)) for s in (3, 3, 4))
    torch.testing.assert_close(one, two)
    assert (one - other).abs().max() > 0.01


def test_exposure_stays_in_range_and_differs_between_images() -> None:
    x = torch.rand(1, 1, 16, 16, generator=seeded(2)).repeat(5, 1, 1, 1)
    varied = random_exposure(x, generator=seeded(3))
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert varied.flatten(1).mean(1).std() > 0.02


def test_zero_strength_changes_nothing() -> None:
    x = torch.rand(2, 1, 8, 8, generator=seeded(2))
    same = random_exposure(x, gamma=1, contrast=0, brightness=0, noise=0)
    torch.testing.assert_close(same, x, atol=2e-4, rtol=0)
    still = random_affine(2, rotation_deg=0, max_zoom=1, translate=0)
    torch.testing.assert_close(still, torch.eye(2, 3).repeat(2, 1, 1))


def test_shading_stays_in_range_and_differs_between_images() -> None:
    torch.manual_seed(4)
    x = 0.5 + 0.1 * torch.rand(1, 1, 16, 16).repeat(5, 1, 1, 1)
    shaded = random_shading(x)
    assert 0 <= shaded.min() < shaded.max() <= 1
    assert (shaded[0] - shaded[1]).abs().max() > 0.01
    assert (shaded - x).abs().mean() < 0.15


def test_plates_are_uniform_rectangles_on_a_fraction_of_the_images() -> None:
    torch.manual_seed(5)
    x = torch.rand(400, 1, 32, 32)
    changed = random_plates(x) != x
    touched = changed.flatten(1).any(1)
    assert 0.35 < touched.float().mean() < 0.55  # some plates are too thin to cover a pixel
    assert changed.flatten(1).float().mean(1).max() < 0.3**2 * 1.2
    one = random_plates(x[:1], share=1.0, largest=1.0)
    assert one[one != x[:1]].unique().numel() == 1
    assert torch.equal(random_plates(x, share=0.0), x)
