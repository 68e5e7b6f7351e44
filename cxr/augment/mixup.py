"""Mixup: images and labels mixed in pairs, on the training device."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Beta

from cxr import schema


def mixup(
    x_BCHW: Tensor, labels_BF: Tensor, others_BCHW: Tensor, other_labels_BF: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Images and labels, each mixed with those of another image (Zhang et al. 2018, arXiv 1710.09412).

    An image becomes λ x + (1 − λ) x', with λ from Beta(alpha, alpha), and its labels, now float32, become
    λ y + (1 − λ) y'. A mixed label is unknown if either label is unknown: the mixed image shows both images, so the
    known label alone would say too little.
    """
    share_B = Beta(alpha, alpha).sample((len(x_BCHW),)).to(x_BCHW.device, non_blocking=True)
    share_B1, share_B111 = share_B[:, None], share_B[:, None, None, None]
    mixed_BF = share_B1 * labels_BF.float() + (1 - share_B1) * other_labels_BF.float()
    unknown_BF = (labels_BF == schema.UNKNOWN) | (other_labels_BF == schema.UNKNOWN)
    x_BCHW = share_B111 * x_BCHW + (1 - share_B111) * others_BCHW
    return x_BCHW, mixed_BF.masked_fill(unknown_BF, schema.UNKNOWN)
