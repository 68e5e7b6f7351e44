"""Multiple-instance learning of where findings lie (Li et al. 2018; Liu et al. 2019): losses over a grid of cells.

Each cell j of a finding has a probability p_j, the sigmoid of its logit. An image shows the finding with probability
p = 1 − ∏(1 − p_j) where no box is known, and is marked as it is with p = ∏_in p_j · ∏_out (1 − p_j) where boxes are.

The papers multiply, and move the factors into [.98, 1] so that the product does not underflow. Here the logarithms
of the factors are summed: nothing underflows, no factor is moved, and no cell's gradient vanishes while it is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.precision import in_float32

_TINY = -10.0  # log of a number x below which log(1 − exp(−x)) is log x − x / 2 to float32's precision
_LINEAR = -15.0  # logit below which softplus is exp to float32's precision


def log_absent(logits_BKPP: Tensor) -> Tensor:
    """(B, K) log(1 − p) = Σ log(1 − p_j), float32: that no cell shows the finding."""
    return F.logsigmoid(-logits_BKPP.float()).flatten(2).sum(2)


def log_present(logits_BKPP: Tensor) -> Tensor:
    """(B, K) log p = log(1 − ∏(1 − p_j)), float32: that some cell shows the finding; however improbable."""
    s = logits_BKPP.float().flatten(2)
    low = s < _LINEAR
    log_rate = torch.where(low, s, F.softplus(s.masked_fill(low, 0)).log()).logsumexp(2)  # of −log(1 − p)
    tiny = log_rate < _TINY
    rate = log_rate.masked_fill(tiny, 0).exp()
    return torch.where(tiny, log_rate - log_rate.exp() / 2, torch.log(-torch.expm1(-rate)))


def log_marked(logits_BKPP: Tensor, inside_BKPP: Tensor) -> Tensor:
    """(B, K) log of ∏_in p_j · ∏_out (1 − p_j), float32: that the finding is in the cells marked and nowhere else."""
    s = logits_BKPP.float()
    return F.logsigmoid(torch.where(inside_BKPP, s, -s)).flatten(2).sum(2)


@in_float32
def cells_inside(boxes_BN5: Tensor, findings: int, grid: int) -> Tensor:
    """Which cells each finding's boxes mark: bool (B, findings, grid, grid).

    A box marks the cells whose middle lies in it, and the one that its own middle lies in, so that none is lost for
    being small. Boxes outside of the image, or without area, mark nothing.

    Args:
        boxes_BN5: index of the finding, x_min, y_min, x_max, y_max as shares of the image; NaN for no box.
    """
    index_BN, edges_BN4 = boxes_BN5[..., 0], boxes_BN5[..., 1:].clamp(0, 1)
    low_BN2, high_BN2 = edges_BN4.chunk(2, -1)
    real_BN = (high_BN2 > low_BN2).all(-1)  # false for NaN
    cell = torch.arange(grid, device=boxes_BN5.device)
    middle = (cell + 0.5) / grid
    own_BN2 = ((low_BN2 + high_BN2) / 2 * grid).floor().clamp(max=grid - 1)
    within_BN2P = (middle > low_BN2[..., None]) & (middle < high_BN2[..., None])
    alone_BN2P = cell == own_BN2[..., None]
    marked_BNPP = _rectangle(within_BN2P) | _rectangle(alone_BN2P)
    of_finding_BNK = (index_BN[..., None] == torch.arange(findings, device=boxes_BN5.device)) & real_BN[..., None]
    return torch.einsum("bnk,bnyx->bkyx", of_finding_BNK.float(), marked_BNPP.float()) > 0


def _rectangle(spans_BN2P: Tensor) -> Tensor:
    """Rows and columns to cells, (B, N, rows, columns)."""
    x_BNP, y_BNP = spans_BN2P.unbind(2)
    return y_BNP[..., :, None] & x_BNP[..., None, :]


@dataclass(frozen=True)
class MILLoss:
    """Negative log-likelihood of labels, and of boxes where they are known.

    Args:
        box_weight: of a finding with a box beside one with a label only: the papers' λ, which is 5 with their moved
            factors. As d log(.98 + .02 p) / dp is about .02, that is about .1 of the factors themselves.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    box_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.box_weight < math.inf:
            raise ValueError(f"box_weight={self.box_weight}: wanted 0 or more")

    def __call__(self, logits_BKPP: Tensor, labels_BK: Tensor, inside_BKPP: Tensor) -> dict[str, Tensor]:
        """Means over all images and findings; an unknown label (−1) counts 0.

        The divisor does not depend on what is known, so that workers' means are the whole batch's mean.

        Args:
            labels_BK: 1, 0, or −1.
            inside_BKPP: see `cells_inside`; where nothing is marked the label alone counts. Boxes of findings whose
                label is not 1 are not looked at.
        """
        positive, negative = labels_BK == 1, labels_BK == 0
        boxed = positive & inside_BKPP.flatten(2).any(2)
        by_label = torch.where(positive & ~boxed, -log_present(logits_BKPP), 0.0)
        by_label = torch.where(negative, -log_absent(logits_BKPP), by_label)
        by_box = torch.where(boxed, -log_marked(logits_BKPP, inside_BKPP), 0.0)
        return {"label": by_label.mean(), "box": self.box_weight * by_box.mean()}


def unlikely_bias(grid: int, probability: float = 0.1) -> float:
    """The logit of every cell with which an image shows a finding with this probability: where training begins.

    From logits of 0 all images would show all findings (as in Lin et al. 2017, section 4.1).
    """
    cell = -math.expm1(math.log1p(-probability) / grid**2)
    return math.log(cell / (1 - cell))
