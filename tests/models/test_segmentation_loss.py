"""Segmentation losses, compared with values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cxr.data.batch import NO_MASK
from cxr.models.segmentation_loss import SMOOTH, UNKNOWN, MaskLoss, image_loss

ALL = MaskLoss(bce_weight=1, dice_weight=1, focal_weight=1)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def images(*rows: list[float]) -> Tensor:
    """Images of one row each, (B, 1, 1, W)."""
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def test_losses_equal_values_computed_by_hand() -> None:
    logits, mask = images([logit(0.8), logit(0.3)]), images([1, 0])
    found = MaskLoss(bce_weight=2, dice_weight=3, focal_weight=1, positive_weight=4)(logits, mask)
    bce = (-4 * math.log(0.8) - math.log(0.7)) / 2
    dice = 1 - (2 * 0.8 + 2 * SMOOTH) / (0.8**2 + 0.3**2 + 1 + 2 * SMOOTH)
    focal = (-0.25 * 0.2**2 * math.log(0.8) - 0.75 * 0.3**2 * math.log(0.7)) / 2
    assert {name: float(loss) for name, loss in found.items()} == pytest.approx(
        {"bce": 2 * bce, "dice": 3 * dice, "focal": focal}, rel=1e-5
    )


def test_focal_loss_with_gamma_0_and_no_alpha_is_cross_entropy() -> None:
    logits, mask = torch.randn(2, 1, 4, 4), (torch.rand(2, 1, 4, 4) > 0.5).to(torch.uint8)
    found = MaskLoss(focal_weight=1, gamma=0, alpha=None)(logits, mask)
    torch.testing.assert_close(found["focal"], found["bce"])


def test_only_terms_with_a_weight_are_returned() -> None:
    found = MaskLoss(bce_weight=0, dice_weight=0, focal_weight=2)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert list(found) == ["focal"]


def test_the_mean_of_two_workers_is_that_of_the_whole_batch() -> None:
    logits, mask = 3 * torch.randn(4, 1, 8, 8), (torch.rand(4, 1, 8, 8) > 0.7).to(torch.uint8)
    mask[1], mask[3], mask[2, :, :4] = UNKNOWN, 0, UNKNOWN
    whole, *halves = (ALL(logits[part], mask[part]) for part in (slice(4), slice(2), slice(2, 4)))
    for name, loss in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, loss)


def test_unknown_pixels_do_not_count() -> None:
    """Neither in value nor in gradient; an image without a known pixel adds 0, and is an image all the same."""
    assert UNKNOWN == NO_MASK
    logits = torch.tensor([[1.0, -1.0, 5.0, -5.0], [3.0, 3.0, 3.0, 3.0]]).view(2, 1, 1, 4).requires_grad_()
    mask = torch.tensor([[1, 0, UNKNOWN, UNKNOWN], [UNKNOWN] * 4], dtype=torch.uint8).view(2, 1, 1, 4)
    found = ALL(logits, mask)
    alone = ALL(logits[:1, ..., :2], mask[:1, ..., :2])
    for name in ("bce", "focal"):
        torch.testing.assert_close(2 * found[name], alone[name])
    torch.testing.assert_close(2 * found["dice"], alone["dice"], atol=1e-4, rtol=0)  # less smooth by two pixels
    sum(found.values(), torch.zeros(())).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.flatten() != 0, torch.tensor([True, True] + [False] * 6))


@pytest.mark.parametrize("logits", [-100.0, -5.0, 0.0, 100.0])
def test_empty_masks_give_finite_losses_that_fall_with_fewer_predicted_pixels(logits: float) -> None:
    values = torch.full((2, 1, 64, 64), logits, requires_grad=True)
    found = MaskLoss(bce_weight=1, dice_weight=1, focal_weight=1, gamma=0.5)(values, torch.zeros(2, 1, 64, 64))
    sum(found.values(), torch.zeros(())).backward()
    assert values.grad is not None
    assert all(loss.isfinite() for loss in found.values())
    assert values.grad.isfinite().all()
    assert (values.grad >= 0).all()
    if logits == -100:
        assert all(loss < 1e-6 for loss in found.values())
    if logits == 100:
        assert 0.99 < found["dice"] <= 1


def test_missing_a_small_mask_costs_nearly_the_whole_dice_loss() -> None:
    """As small as the smallest pneumothorax of SIIM: 55 pixels of 1024 x 1024."""
    mask = torch.zeros(1, 1, 1024, 1024)
    mask[..., :5, :11] = 1
    assert MaskLoss(bce_weight=0)(torch.full_like(mask, -50), mask)["dice"] > 0.8
    assert MaskLoss(bce_weight=0)(100 * mask - 50, mask)["dice"] < 1e-4


def test_float32_under_autocast() -> None:
    logits, mask = torch.randn(2, 1, 16, 16).bfloat16(), torch.ones(2, 1, 16, 16, dtype=torch.uint8)
    plain = ALL(logits.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = ALL(logits, mask)
        image = image_loss(logits[:, 0, 0, 0], torch.tensor([1, 0]))
    assert {loss.dtype for loss in (*found.values(), image)} == {torch.float32}
    for name, loss in plain.items():
        assert torch.equal(found[name], loss)


def test_image_loss_by_hand() -> None:
    logits = torch.tensor([logit(0.8), logit(0.3), 9.0, 9.0])
    found = image_loss(logits, torch.tensor([1, 0, -1, UNKNOWN]))
    assert float(found) == pytest.approx((-math.log(0.8) - math.log(0.7)) / 4)


@pytest.mark.parametrize(
    "wrong", [{"bce_weight": -1.0}, {"bce_weight": 0.0, "dice_weight": 0.0}, {"alpha": 1.5}, {"gamma": -2.0}]
)
def test_invalid_settings_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        MaskLoss(**wrong)
