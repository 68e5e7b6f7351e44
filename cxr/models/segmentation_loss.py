"""Segmentation losses: weighted cross-entropy, soft Dice (Milletari et al. 2016) and focal loss (Lin et al. 2017).

Each is computed per image, then averaged over the batch, so the mean over workers with equal numbers of images is the
loss of the whole batch. Unknown pixels are ignored. An image without known pixels has a loss of 0 but still counts in
the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

UNKNOWN = 255  # value of unknown pixels, as `data.batch.NO_MASK`
SMOOTH = 1e-5  # fraction of the image added to both sides of Dice's quotient: less than the smallest pneumothorax


@dataclass(frozen=True)
class MaskLoss:
    """Weights and settings of the losses.

    Raises:
        ValueError: a setting is negative, or all weights are 0.
    """

    bce_weight: float = 1.0
    dice_weight: float = 1.0
    focal_weight: float = 0.0
    positive_weight: float = 1.0
    """Weight of the target's pixels in the cross-entropy; other pixels have weight 1."""
    gamma: float = 2.0
    """Exponent of the focal loss; larger values reduce the weight of pixels that are classified well."""
    alpha: float | None = 0.25
    """Weight of the target's pixels in the focal loss; others have 1 − alpha. None weighs all pixels equally."""

    def __post_init__(self) -> None:
        weights = (self.bce_weight, self.dice_weight, self.focal_weight)
        settings = (*weights, self.positive_weight, self.gamma, self.alpha or 0.0)
        if min(settings) < 0 or max(weights) <= 0 or (self.alpha or 0.0) > 1:
            raise ValueError(
                f"expected no negative setting, at least one loss weight above 0 and alpha up to 1, got {self}"
            )

    def __call__(self, logits_B1HW: Tensor, mask_B1HW: Tensor) -> dict[str, Tensor]:
        """Weighted scalar losses by name, float32; only those whose weight is not 0.

        `mask_B1HW` is 1 on the target, 0 elsewhere and 255 where unknown, in any dtype.
        """
        with torch.autocast(logits_B1HW.device.type, enabled=False):
            logits, mask = logits_B1HW.float().flatten(1), mask_B1HW.flatten(1)
            known = (mask != UNKNOWN).float()
            truth = mask.float() * known
            losses: dict[str, Tensor] = {}
            if self.bce_weight:
                losses["bce"] = self.bce_weight * _mean(self._cross_entropy(logits, truth), known)
            if self.dice_weight:
                losses["dice"] = self.dice_weight * _dice_loss(logits.sigmoid(), truth, known)
            if self.focal_weight:
                losses["focal"] = self.focal_weight * _mean(self._focal(logits, truth), known)
            return losses

    def _cross_entropy(self, logits_BN: Tensor, truth_BN: Tensor) -> Tensor:
        weight = 1 + (self.positive_weight - 1) * truth_BN
        return weight * F.binary_cross_entropy_with_logits(logits_BN, truth_BN, reduction="none")

    def _focal(self, logits_BN: Tensor, truth_BN: Tensor) -> Tensor:
        """−α_t (1 − p_t)^γ log p_t, where p_t is the probability of the true class."""
        true_logits = (2 * truth_BN - 1) * logits_BN
        log_wrong, log_right = F.logsigmoid(-true_logits), F.logsigmoid(true_logits)
        balance = 1.0 if self.alpha is None else self.alpha * truth_BN + (1 - self.alpha) * (1 - truth_BN)
        return -balance * torch.exp(self.gamma * log_wrong) * log_right


def image_loss(logits_B: Tensor, present_B: Tensor) -> Tensor:
    """Cross-entropy of whether the image shows the target, mean over all images; values other than 0 and 1 are
    unknown."""
    known = (present_B == 0) | (present_B == 1)
    with torch.autocast(logits_B.device.type, enabled=False):
        truth = torch.where(known, present_B, 0).float()
        losses = F.binary_cross_entropy_with_logits(logits_B.float(), truth, reduction="none")
        return (losses * known).mean()


def _mean(losses_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Mean over each image's known pixels, then over images."""
    return ((losses_BN * known_BN).sum(1) / known_BN.sum(1).clamp(min=1)).mean()


def _dice_loss(p_BN: Tensor, truth_BN: Tensor, known_BN: Tensor) -> Tensor:
    """1 − 2 Σ pt / (Σ p² + Σ t²) per image, then the mean; 0 if truth and prediction are both empty."""
    smooth = SMOOTH * p_BN.shape[1]
    p = p_BN * known_BN
    dice = (2 * (p * truth_BN).sum(1) + smooth) / (p.square().sum(1) + truth_BN.sum(1) + smooth)
    return (1 - dice).mean()
