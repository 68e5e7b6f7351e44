"""From probabilities to masks: the three thresholds of SIIM-ACR's winners, and how they are selected.

If too few pixels have a very high probability, the mask is empty; otherwise it contains all likely pixels (Aimoldin,
first place of SIIM-ACR Pneumothorax Segmentation, 2019). A single threshold cannot do both: a single false pixel in
an image without a pneumothorax reduces its Dice from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

TOPS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
BOTTOMS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1)  # the first of equally good ones is selected
MIN_AREAS = (0.0, *(pixels / 1024**2 for pixels in (125, 250, 500, 1000, 1500, 2000, 3000, 4000, 8000)))
_DIGITS = 12  # decimals of a mean Dice; smaller differences are rounding errors


@dataclass(frozen=True)
class MaskRule:
    """When a mask is empty, and which pixels belong to it otherwise. The defaults are the winners' own, (.75, 2000,
    .3).

    Attributes:
        top: probability above which a pixel is nearly certain.
        min_area: share of nearly certain pixels in the image below which the mask is empty. The winners count pixels
            of 1024 x 1024; as a share, the rule holds for every size. 0: no mask is emptied.
        bottom: probability above which a pixel belongs to a mask that is not empty.
    """

    top: float = 0.75
    min_area: float = 2000 / 1024**2
    bottom: float = 0.3

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in asdict(self).values()):
            raise ValueError(f"expected shares in [0, 1], got {self}")

    def apply(self, probabilities_BHW: Tensor) -> Tensor:
        """Bool masks (B, H, W)."""
        return apply_rule(probabilities_BHW, self.top, self.min_area, self.bottom)

    def describe(self) -> dict[str, float]:
        """As plain JSON, for a checkpoint."""
        return asdict(self)


def apply_rule(
    probabilities_BHW: Tensor, top: float | Tensor, min_area: float | Tensor, bottom: float | Tensor
) -> Tensor:
    """Bool masks (B, H, W) by the rule with these values, which may be scalar tensors on the device.

    Does not wait for the device, and can be traced for export.
    """
    p = probabilities_BHW.float()
    certain = (p > top).flatten(1).sum(1).double()
    return (p > bottom) & (certain >= min_area * (p.shape[-2] * p.shape[-1]))[:, None, None]


def rule_rows(
    probabilities_BHW: Tensor, true_BHW: Tensor, tops: Sequence[float] = TOPS, bottoms: Sequence[float] = BOTTOMS
) -> Tensor:
    """The counts of each image that `choose_rule` needs, int64 (B, K), on the device.

    Numbers of pixels: above each of `tops`; above each of `bottoms`; above each of `bottoms` and true; true; of the
    image.
    """
    p, true = probabilities_BHW.flatten(1).float(), true_BHW.flatten(1).bool()
    levels = sorted({*tops, *bottoms})
    above_B2L = _above(p, true, levels)
    certain, likely = ([levels.index(value) for value in values] for values in (tops, bottoms))
    any_BL, true_BL = above_B2L.sum(1), above_B2L[:, 1]
    sizes = torch.stack([true.sum(1), torch.full_like(any_BL[:, 0], p.shape[1])], 1)
    return torch.cat([any_BL[:, certain], any_BL[:, likely], true_BL[:, likely], sizes], 1)


def _above(p_BN: Tensor, true_BN: Tensor, levels: Sequence[float]) -> Tensor:
    """(B, 2, L) numbers of an image's false and true pixels above each of the ascending `levels`."""
    passed = torch.bucketize(p_BN, torch.tensor(levels, device=p_BN.device))  # levels that are below the pixel
    kinds, bins = 2 * len(p_BN), len(levels) + 1
    kind = 2 * torch.arange(len(p_BN), device=p_BN.device)[:, None] + true_BN
    counts = torch.bincount((kind * bins + passed).flatten(), minlength=kinds * bins).reshape(-1, 2, bins)
    return counts.flip(2).cumsum(2).flip(2)[:, :, 1:]


def choose_rule(
    rows: Tensor,
    tops: Sequence[float] = TOPS,
    bottoms: Sequence[float] = BOTTOMS,
    min_areas: Sequence[float] = MIN_AREAS,
) -> MaskRule:
    """The rule with the highest mean Dice over images (two empty masks: 1), of all combinations.

    Among equally good rules, the one with the smallest `min_area` is selected, then the first of `bottoms`, then of
    `tops`.

    Args:
        rows: of `rule_rows`, gathered over workers, made with the same `tops` and `bottoms`.

    Raises:
        ValueError: there is no image, or the rows have another grid.
    """
    counts = rows.cpu().double().numpy()
    columns = len(tops) + 2 * len(bottoms) + 2
    if not len(counts) or counts.shape[1] != columns:
        raise ValueError(f"expected rows of this grid, (images > 0, {columns}), got {counts.shape}")
    certain, likely, both, true, pixels = np.split(
        counts, np.cumsum([len(tops), len(bottoms), len(bottoms), 1]), axis=1
    )
    not_empty_ANT = np.stack([certain >= area * pixels for area in min_areas])
    dice_ABT = _mean_dice(not_empty_ANT, likely, both, true)
    area, bottom, top = map(int, np.unravel_index(np.round(dice_ABT, _DIGITS).argmax(), dice_ABT.shape))
    return MaskRule(tops[top], min_areas[area], bottoms[bottom])


def _mean_dice(
    not_empty_ANT: np.ndarray, likely_NB: np.ndarray, both_NB: np.ndarray, true_N1: np.ndarray
) -> np.ndarray:
    """(A, B, T) mean Dice of each combination, where emptied masks count as empty."""
    below = likely_NB + true_N1
    of_mask = np.where(below > 0, 2 * both_NB / np.maximum(below, 1), 1.0)
    of_empty = (true_N1 == 0).astype(np.float64)
    gain_NB = of_mask - of_empty
    return of_empty.mean() + gain_NB.T @ not_empty_ANT / len(gain_NB)


def decided(rows: Tensor, rule: MaskRule, tops: Sequence[float] = TOPS, bottoms: Sequence[float] = BOTTOMS) -> Tensor:
    """The overlap counts of each image under `rule`: int64 (B, 4), as in `metrics.segmentation.overlap_rows`.

    Raises:
        ValueError: the rule is not in that grid.
    """
    top, bottom = tops.index(rule.top), bottoms.index(rule.bottom)
    certain, likely, both, sizes = rows.split([len(tops), len(bottoms), len(bottoms), 2], dim=1)
    not_empty = certain[:, top] >= (rule.min_area * sizes[:, 1]).ceil()
    return torch.stack([both[:, bottom] * not_empty, likely[:, bottom] * not_empty, *sizes.unbind(1)], 1)
