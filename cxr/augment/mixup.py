"""Mixup: images and labels mixed in pairs, on the training device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from cxr import schema


def mixup(x_BCHW: Tensor, labels_BF: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Images and labels mixed with those of a random partner in the batch (Zhang et al. 2018, arXiv 1710.09412).

    An image becomes λ x + (1 − λ) x', with λ from Beta(alpha, alpha), and its labels, now float32, become
    λ y + (1 − λ) y'. A mixed label is unknown if either label is unknown: the mixed image shows both images, so the
    known label alone would say too little. Images that are mixed with themselves keep their labels.
    """
    count, device = len(x_BCHW), x_BCHW.device
    partner_B = torch.randperm(count).to(device, non_blocking=True)
    share_B = Beta(alpha, alpha).sample((count,)).to(device, non_blocking=True)
    labels_BF, share_B1 = labels_BF.float(), share_B[:, None]
    others_BF = labels_BF[partner_B]
    mixed_BF = share_B1 * labels_BF + (1 - share_B1) * others_BF
    unknown_BF = (labels_BF == schema.UNKNOWN) | (others_BF == schema.UNKNOWN)
    share_B111 = share_B[:, None, None, None]
    x_BCHW = share_B111 * x_BCHW + (1 - share_B111) * x_BCHW[partner_B]
    return x_BCHW, mixed_BF.masked_fill(unknown_BF, schema.UNKNOWN)
