"""Losses of masks: weighted cross-entropy, soft Dice (Milletari et al. 2016) and focal loss (Lin et al. 2017).

Each is a mean over the images of a batch, of what it is for each image alone; hence the mean over workers with
equally many images each is that of the whole batch. A pixel that is unknown counts nothing, and an image without a
known one adds 0: it is still counted as an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

UNKNOWN = 255  # of a mask's pixels, as `batches.NO_MASK`
SMOOTH = 1e-5  # share of the image added to both sides of Dice's fraction: less than the smallest pneumothorax


@dataclass(frozen=True)
class MaskLoss:
    """How much each loss weighs, and their settings.

    Raises:
        ValueError: a negative setting, or no loss at all.
    """

    bce: float = 1.0
    dice: float = 1.0
    focal: float = 0.0
    positive_weight: float = 1.0
    """Of a pixel of the finding in `bce`, beside 1 for any other."""
    gamma: float = 2.0
    """How much less `focal` counts pixels that are found easily."""
    alpha: float | None = 0.25
    """Of a pixel of the finding in `focal`, beside 1 − alpha for any other; None counts all alike."""

    def __post_init__(self) -> None:
        weights = (self.bce, self.dice, self.focal)
        settings = (*weights, self.positive_weight, self.gamma, self.alpha or 0.0)
        if min(settings) < 0 or max(weights) <= 0 or (self.alpha or 0.0) > 1:
            raise ValueError(f"{self}: wanted nothing negative, one weight above 0, alpha up to 1")

    def __call__(self, logits_B1HW: Tensor, mask_B1HW: Tensor) -> dict[str, Tensor]:
        """Weighted losses by name, scalars, float32; only those with a weight.

        `mask_B1HW` is 1 on the finding, 0 elsewhere, 255 where unknown, of any dtype.
        """
        with torch.autocast(logits_B1HW.device.type, enabled=False):
            logits, mask = logits_B1HW.float().flatten(1), mask_B1HW.flatten(1)
            known = (mask != UNKNOWN).float()
            truth = mask.float() * known
            losses = {
                "bce": lambda: self.bce * _mean(self._cross_entropy(logits, truth), known),
                "dice": lambda: self.dice * _dice_loss(logits.sigmoid(), truth, known),
                "focal": lambda: self.focal * _mean(self._focal(logits, truth), known),
            }
            return {name: loss() for name, loss in losses.items() if getattr(self, name) > 0}

    def _cross_entropy(self, logits_BN: Tensor, truth_BN: Tensor) -> Tensor:
        heavier = 1 + (self.positive_weight - 1) * truth_BN
        return heavier * F.binary_cross_entropy_with_logits(logits_BN, truth_BN, reduction="none")

    def _focal(self, logits_BN: Tensor, truth_BN: Tensor) -> Tensor:
        """−α_t (1 − p_t)^γ log p_t, where p_t is the probability of what is true."""
        for_truth = (2 * truth_BN - 1) * logits_BN
        log_wrong, log_right = F.logsigmoid(-for_truth), F.logsigmoid(for_truth)
        balance = 1.0 if self.alpha is None else self.alpha * truth_BN + (1 - self.alpha) * (1 - truth_BN)
        return -balance * torch.exp(self.gamma * log_wrong) * log_right


def image_loss(logits_B: Tensor, present_B: Tensor) -> Tensor:
    """Cross-entropy of whether the image shows the finding, mean over all images; neither 1 nor 0 is unknown."""
    known = (present_B == 0) | (present_B == 1)
    with torch.autocast(logits_B.device.type, enabled=False):
        truth = torch.where(known, present_B, 0).float()
        losses = F.binary_cross_entropy_with_logits(logits_B.float(), truth, reduction="none")
        return (losses * known).mean()


def _mean(losses_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Mean over the known pixels of each image, then over images."""
    return ((losses_BN * known_BN).sum(1) / known_BN.sum(1).clamp(min=1)).mean()


def _dice_loss(p_BN: Tensor, truth_BN: Tensor, known_BN: Tensor) -> Tensor:
    """1 − 2 Σ pt / (Σ p² + Σ t²), image by image; 0 where nothing is there and nothing is found."""
    smooth = SMOOTH * p_BN.shape[1]
    p = p_BN * known_BN
    dice = (2 * (p * truth_BN).sum(1) + smooth) / (p.square().sum(1) + truth_BN.sum(1) + smooth)
    return (1 - dice).mean()
