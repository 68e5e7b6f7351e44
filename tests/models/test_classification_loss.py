"""Losses of classification, compared with their formulas in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.models.classification_loss import asymmetric_loss

LOGITS = torch.tensor([[0.3, -1.0, 4.0, -2.5], [2.0, 1.0, -0.5, -6.0]])
LABELS = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])


def ridnik(gamma_positive: float, gamma_negative: float, margin: float) -> Tensor:
    """Equations 1 and 4 to 6 of Ridnik et al. 2021, term by term."""
    losses = torch.zeros(2, 4, dtype=torch.double)
    for place, logit in enumerate(LOGITS.double().flatten()):
        p = 1 / (1 + (-logit).exp())
        p_m = max(p - margin, torch.tensor(0.0))
        positive = (1 - p) ** gamma_positive * p.log()
        negative = p_m**gamma_negative * (1 - p_m).log()
        losses.view(-1)[place] = -(positive if LABELS.flatten()[place] else negative)
    return losses


@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 4.0), (0.0, 0.0), (2.0, 2.0), (0.5, 1.5)])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
def test_the_asymmetric_loss_is_that_of_the_paper(gammas: tuple[float, float], margin: float) -> None:
    found = asymmetric_loss(LOGITS, LABELS, gamma_positive=gammas[0], gamma_negative=gammas[1], margin=margin)
    torch.testing.assert_close(found.double(), ridnik(*gammas, margin), rtol=1e-5, atol=1e-7)


def test_equal_exponents_without_a_margin_are_the_focal_loss() -> None:
    """Equation 4 of Lin et al. 2017: −(1 − p_t)^γ log p_t."""
    p = LOGITS.double().sigmoid()
    p_t = torch.where(LABELS == 1, p, 1 - p)
    found = asymmetric_loss(LOGITS, LABELS, gamma_positive=2, gamma_negative=2, margin=0)
    torch.testing.assert_close(found.double(), -((1 - p_t) ** 2) * p_t.log(), rtol=1e-5, atol=1e-7)


def test_without_exponents_it_is_the_cross_entropy_also_of_mixed_targets() -> None:
    targets = torch.tensor([[0.25, 0, 1, 0.5], [0.9, 1, 0, 0.1]])
    found = asymmetric_loss(LOGITS, targets, gamma_positive=0, gamma_negative=0, margin=0)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none"))


def test_class_weights_multiply_the_positive_and_the_negative_part() -> None:
    weights = torch.tensor([[2.0, 3, 5, 7], [11.0, 13, 17, 19]])
    plain = asymmetric_loss(LOGITS, LABELS)
    found = asymmetric_loss(LOGITS, LABELS, class_weight_2F=weights)
    torch.testing.assert_close(found, plain * torch.where(LABELS == 1, weights[1], weights[0]))


def test_extreme_logits_have_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[-200.0, 200.0, -200.0, 200.0]], requires_grad=True)
    for margin in (0.0, 0.05):
        loss = asymmetric_loss(
            logits, torch.tensor([[1, 0, 0, 1]]), gamma_positive=0.5, gamma_negative=0.5, margin=margin
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
