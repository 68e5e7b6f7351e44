"""Losses of multi-label classification, from logits and targets, one value per image and finding.

Targets are the probabilities of positive labels: 0 and 1, or between them for mixed images.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-8  # keeps powers of probabilities differentiable at 0


def asymmetric_loss(
    logits_BF: Tensor,
    targets_BF: Tensor,
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    class_weight_2F: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119, equations 3 to 6), float32 (B, F).

    With p the probability and p_m = max(p − margin, 0), it is −(1 − p)^gamma_positive · log p for positives and
    −p_m^gamma_negative · log(1 − p_m) for negatives. The margin discards negatives that are very easy. If both gammas
    are equal and the margin is 0, this is the focal loss (Lin et al. 2017, arXiv 1708.02002, without α); if both are
    0, too, it is the cross-entropy.

    Args:
        gamma_positive: exponent by which the loss of positives falls with their probability.
        gamma_negative: exponent by which the loss of negatives falls with 1 − p.
        class_weight_2F: weights of the negatives and of the positives of each finding.
    """
    logits_BF, targets_BF = logits_BF.float(), targets_BF.float()
    positive_BF, negative_BF = -F.logsigmoid(logits_BF), -F.logsigmoid(-logits_BF)
    p_BF = logits_BF.sigmoid()
    if margin:
        p_BF = (p_BF - margin).clamp(min=0)
        negative_BF = -(-p_BF).log1p()
    if gamma_positive:
        positive_BF = positive_BF * (-logits_BF).sigmoid().clamp(min=_TINY) ** gamma_positive
    if gamma_negative:
        negative_BF = negative_BF * p_BF.clamp(min=_TINY) ** gamma_negative
    if class_weight_2F is not None:
        weight_of_negatives_F, weight_of_positives_F = class_weight_2F
        positive_BF, negative_BF = weight_of_positives_F * positive_BF, weight_of_negatives_F * negative_BF
    return targets_BF * positive_BF + (1 - targets_BF) * negative_BF
