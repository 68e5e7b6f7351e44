"""Multiple-instance learning of the locations of findings (Li et al. 2018; Liu et al. 2019) on a grid of cells.

Each cell j of a finding has a probability p_j, the sigmoid of its logit. Without boxes, an image shows the finding
with probability p = 1 − ∏(1 − p_j). With boxes, their likelihood is p = ∏_in p_j · ∏_out (1 − p_j).

The papers multiply, and rescale the factors into [.98, 1] to prevent underflow. Here the logarithms of the factors
are
summed: nothing underflows, no factor is rescaled, and the gradient of a wrong cell never vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.precision import in_float32

_TINY = -10.0  # below this log x, log(1 − exp(−x)) equals log x − x / 2 to float32's precision
_LINEAR = -15.0  # below this logit, softplus equals exp to float32's precision


def log_absent(logits_BKPP: Tensor) -> Tensor:
    """(B, K) log(1 − p) = Σ log(1 − p_j), float32: log-probability that no cell shows the finding."""
    return F.logsigmoid(-logits_BKPP.float()).flatten(2).sum(2)


def log_present(logits_BKPP: Tensor) -> Tensor:
    """(B, K) log p = log(1 − ∏(1 − p_j)), float32: log-probability that some cell shows the finding, however
    small."""
    s = logits_BKPP.float().flatten(2)
    low = s < _LINEAR
    log_rate = torch.where(low, s, F.softplus(s.masked_fill(low, 0)).log()).logsumexp(2)  # log of −log(1 − p)
    tiny = log_rate < _TINY
    rate = log_rate.masked_fill(tiny, 0).exp()
    return torch.where(tiny, log_rate - log_rate.exp() / 2, torch.log(-torch.expm1(-rate)))


def log_marked(logits_BKPP: Tensor, inside_BKPP: Tensor) -> Tensor:
    """(B, K) log of ∏_in p_j · ∏_out (1 − p_j), float32: the finding is in the marked cells and nowhere else."""
    s = logits_BKPP.float()
    return F.logsigmoid(torch.where(inside_BKPP, s, -s)).flatten(2).sum(2)


@in_float32
def cells_inside(boxes_BN5: Tensor, findings: int, grid: int) -> Tensor:
    """The cells that each finding's boxes mark: bool (B, findings, grid, grid).

    A box marks the cells whose centers lie in it, and the cell that contains its own center, so that small boxes are
    not lost. Boxes outside the image and boxes without area mark nothing.

    Args:
        boxes_BN5: index of the finding, x_min, y_min, x_max, y_max as fractions of the image; NaN: no box.
    """
    index_BN, edges_BN4 = boxes_BN5[..., 0], boxes_BN5[..., 1:].clamp(0, 1)
    low_BN2, high_BN2 = edges_BN4.chunk(2, -1)
    valid_BN = (high_BN2 > low_BN2).all(-1)  # false for NaN
    cell = torch.arange(grid, device=boxes_BN5.device)
    center = (cell + 0.5) / grid
    own_BN2 = ((low_BN2 + high_BN2) / 2 * grid).floor().clamp(max=grid - 1)
    within_BN2P = (center > low_BN2[..., None]) & (center < high_BN2[..., None])
    own_BN2P = cell == own_BN2[..., None]
    marked_BNPP = _rectangle(within_BN2P) | _rectangle(own_BN2P)
    of_finding_BNK = (index_BN[..., None] == torch.arange(findings, device=boxes_BN5.device)) & valid_BN[..., None]
    return torch.einsum("bnk,bnyx->bkyx", of_finding_BNK.float(), marked_BNPP.float()) > 0


def _rectangle(spans_BN2P: Tensor) -> Tensor:
    """Marked columns and rows to marked cells, (B, N, rows, columns)."""
    x_BNP, y_BNP = spans_BN2P.unbind(2)
    return y_BNP[..., :, None] & x_BNP[..., None, :]


@dataclass(frozen=True)
class MILLoss:
    """Negative log-likelihood of labels, and of boxes where they are known.

    Args:
        box_weight: weight of a finding with boxes relative to one with only a label: λ in the papers, which is 5 for
            their rescaled factors. Since d log(.98 + .02 p) / dp is about .02, this corresponds to about .1 here.

    Raises:
        ValueError: the weight is negative or not finite.
    """

    box_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.box_weight < math.inf:
            raise ValueError(f"box_weight: expected 0 or more, got {self.box_weight}")

    def __call__(self, logits_BKPP: Tensor, labels_BK: Tensor, inside_BKPP: Tensor) -> dict[str, Tensor]:
        """Means over all images and findings; the loss of an unknown label (−1) is 0.

        The divisor does not depend on what is known, so that the mean over workers is the mean over the whole batch.

        Args:
            labels_BK: 1, 0, or −1 for unknown.
            inside_BKPP: see `cells_inside`. Without marked cells only the label counts. Boxes of findings whose label
                is not 1 are ignored.
        """
        positive, negative = labels_BK == 1, labels_BK == 0
        boxed = positive & inside_BKPP.flatten(2).any(2)
        by_label = torch.where(positive & ~boxed, -log_present(logits_BKPP), 0.0)
        by_label = torch.where(negative, -log_absent(logits_BKPP), by_label)
        by_box = torch.where(boxed, -log_marked(logits_BKPP, inside_BKPP), 0.0)
        return {"label": by_label.mean(), "box": self.box_weight * by_box.mean()}


def unlikely_bias(grid: int, probability: float = 0.1) -> float:
    """The logit of every cell for which an image shows a finding with this probability: the initial bias.

    With logits of 0 all images would show all findings (see Lin et al. 2017, section 4.1).
    """
    cell = -math.expm1(math.log1p(-probability) / grid**2)
    return math.log(cell / (1 - cell))
