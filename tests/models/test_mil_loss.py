"""Multiple-instance losses against products in float64, at the ends of floats' range; which cells boxes mark."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cxr.models.mil_loss import MILLoss, cells_inside, log_absent, log_marked, log_present, unlikely_bias

NONE = [math.nan] * 5


def grids(scale: float) -> Tensor:
    return scale * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def products(logits: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 − ∏(1 − p_j), ∏(1 − p_j) and ∏_in p_j · ∏_out (1 − p_j), multiplied in float64."""
    p = logits.double().sigmoid()
    absent = (1 - p).flatten(2).prod(2)
    return 1 - absent, absent, torch.where(inside, p, 1 - p).flatten(2).prod(2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_log_probabilities_equal_the_logarithms_of_products(scale: float) -> None:
    logits = grids(scale) - 2
    inside = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    present, absent, marked = products(logits, inside)
    assert torch.allclose(log_present(logits).double(), present.log(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(log_absent(logits).double(), absent.log(), rtol=1e-5)
    assert torch.allclose(log_marked(logits, inside).double(), marked.log(), rtol=1e-5)


@pytest.mark.parametrize("logit", [-300.0, -90.0, -30.0, -16.0, -15.0, -14.0, -10.0, -5.0])
def test_tiny_probabilities_keep_finite_logarithms_and_gradients(logit: float) -> None:
    """p = 256 · exp(logit), where products in floats would give 0, or 1 − 1."""
    logits = torch.full((1, 1, 16, 16), logit, requires_grad=True)
    log_p = log_present(logits)
    rate = 256 * math.log1p(math.exp(logit))
    wanted = math.log(-math.expm1(-rate)) if rate > 1e-12 else math.log(256) + logit
    assert log_p.item() == pytest.approx(wanted, rel=1e-5)
    log_p.backward()
    slope = rate / math.expm1(rate) if rate > 1e-12 else 1.0
    assert logits.grad is not None
    assert logits.grad.sum().item() == pytest.approx(slope / (1 + math.exp(logit)) * _odds(logit), rel=1e-3)


def _odds(logit: float) -> float:
    """d softplus / d logit over softplus, times 1 + exp(logit)."""
    p = math.exp(logit)
    return p / math.log1p(p) if p > 1e-12 else 1.0


@pytest.mark.parametrize("logit", [5.0, 50.0, 1000.0])
def test_certain_findings_have_no_loss_and_missing_them_a_large_one(logit: float) -> None:
    logits = torch.full((1, 1, 16, 16), logit, requires_grad=True)
    assert log_present(logits).item() == 0
    loss = -log_absent(logits)
    assert loss.item() == pytest.approx(256 * logit, rel=1e-2)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.min() > 0.99


def test_the_papers_rescaled_product_is_close_only_where_cells_are_few() -> None:
    """Factors moved into [.98, 1] never give 256 cells a probability of absence below .98²⁵⁶."""
    sure = torch.full((1, 1, 16, 16), 20.0)
    rescaled = (0.98 + 0.02 * (1 - sure.double().sigmoid())).prod()
    assert rescaled > 0.005
    assert log_absent(sure).item() < -5000


def test_boxes_mark_cells_by_their_centers_and_at_least_one() -> None:
    """On a grid of 4: the left half; a dot; a box in a corner that overlaps no middle; all; nothing; outside."""
    boxes = torch.tensor(
        [
            [[0, 0.0, 0.0, 0.5, 1.0], [1, 0.60, 0.60, 0.61, 0.61], [2, 0.95, 0.0, 1.0, 0.05]],
            [[0, 0.0, 0.0, 1.0, 1.0], [1, 0.3, 0.3, 0.3, 0.9], [2, 1.2, 0.1, 1.6, 0.5]],
            [[1, -0.5, -0.5, 1.7, 0.24], [1, 0.0, 0.76, 1.0, 1.5], NONE],
        ]
    )
    marked = cells_inside(boxes, 3, 4)
    assert marked.dtype == torch.bool
    assert marked[0, 0].tolist() == [[True, True, False, False]] * 4
    assert marked[0, 1].nonzero().tolist() == [[2, 2]]
    assert marked[0, 2].nonzero().tolist() == [[0, 3]]
    assert marked[1, 0].all()
    assert not marked[1, 1:].any(), "no area, and outside of the image"
    assert marked[2, 1].any(1).tolist() == [True, False, False, True], "both boxes of one finding"
    assert not marked[2, [0, 2]].any()


def test_each_finding_uses_its_box_its_label_or_neither() -> None:
    logits = grids(1)[:2]
    labels = torch.tensor([[1, 1, 0], [-1, 0, 1]], dtype=torch.int8)
    inside = torch.zeros(logits.shape, dtype=torch.bool)
    inside[0, 0, 1:3, 1:3] = True
    inside[1, 1, 0, 0] = True  # of a finding that the label denies
    present, absent, marked = (value.log() for value in products(logits, inside))
    terms = MILLoss(box_weight=5)(logits, labels, inside)
    by_label = -(present[0, 1] + absent[0, 2] + absent[1, 1] + present[1, 2]) / 6
    assert terms["label"].item() == pytest.approx(by_label.item(), rel=1e-5)
    assert terms["box"].item() == pytest.approx(-5 * marked[0, 0].item() / 6, rel=1e-5)


def test_a_box_of_the_whole_image_requires_every_cell() -> None:
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    everywhere = cells_inside(torch.tensor([[[0, 0.0, 0.0, 1.0, 1.0]]]), 1, 4)
    terms = MILLoss(1)(logits, torch.ones(1, 1, dtype=torch.int8), everywhere)
    assert terms["label"].item() == 0
    assert terms["box"].item() == pytest.approx(16 * math.log(2))
    terms["box"].backward()
    assert logits.grad is not None
    assert (logits.grad < 0).all()


def test_initial_logits_give_the_requested_probability() -> None:
    for grid in (1, 4, 16):
        logits = torch.full((1, 1, grid, grid), unlikely_bias(grid, 0.1))
        assert log_present(logits).exp().item() == pytest.approx(0.1, rel=1e-4)


def test_weights_out_of_range_are_rejected() -> None:
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="box_weight"):
            MILLoss(wrong)
