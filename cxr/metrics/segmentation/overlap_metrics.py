"""Overlap of found and true masks, from four counts an image: Dice, IoU, mean IU, pixel accuracy.

Rows are int64 (N, 4): pixels of the intersection, of the found mask, of the true mask, of the image. Images may
have different sizes; rows of workers are gathered, then divided here.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cxr.metrics.bootstrap import ratio
from cxr.metrics.classification import auroc, decisions

INTERSECTION, FOUND, TRUE, PIXELS = range(4)


def overlap_rows(found_BHW: Tensor, true_BHW: Tensor) -> Tensor:
    """Rows of two stacks of bool masks, on their device, without a host sync."""
    assert found_BHW.dtype == true_BHW.dtype == torch.bool, "masks are decided before they are compared"
    assert found_BHW.shape == true_BHW.shape
    found, true = found_BHW.flatten(1), true_BHW.flatten(1)
    pixels = torch.full((len(found),), found.shape[1], device=found.device)
    return torch.stack([(found & true).sum(1), found.sum(1), true.sum(1), pixels], 1)


def dice(rows: Tensor) -> Tensor:
    """(N,) float64 2·|A∩B| / (|A| + |B|); 1 where both masks are empty."""
    intersection, found, true, _ = rows.double().unbind(1)
    return _or_one(2 * intersection, found + true)


def iou(rows: Tensor) -> Tensor:
    """(N,) float64 |A∩B| / |A∪B|; 1 where both masks are empty."""
    intersection, found, true, _ = rows.double().unbind(1)
    return _or_one(intersection, found + true - intersection)


def _or_one(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=1), 1.0)


def summary(rows: Tensor) -> dict[str, float]:
    """All overlap figures of a set of images, NaN where there is none to measure.

    dice, iou: means over images, two empty masks count 1, which is how SIIM-ACR (2019) ranks by Dice.
    positive_dice: mean over the images with something to find. empty_dice: the dice of finding nothing anywhere,
    which is the share of images with nothing to find: what dice must be read beside. mean_iu, pixel_accuracy:
    of all images' pixels together (Long et al. 2015); mean_iu is the mean over background and target of the IoU,
    over the background alone if the target is neither there nor found. images, positives: counts.
    """
    rows = rows.cpu()
    per_image, positive = dice(rows), rows[:, TRUE] > 0
    mean_iu, pixel_accuracy = _pooled(rows)
    return {
        "dice": per_image.mean().item(),
        "positive_dice": per_image[positive].mean().item(),
        "empty_dice": (~positive).double().mean().item(),
        "iou": iou(rows).mean().item(),
        "mean_iu": mean_iu,
        "pixel_accuracy": pixel_accuracy,
        "images": len(rows),
        "positives": int(positive.sum()),
    }


def _pooled(rows: Tensor) -> tuple[float, float]:
    """Mean IU and pixel accuracy of all pixels together."""
    both, found, true, pixels = (int(total) for total in rows.sum(0))
    if not pixels:
        return math.nan, math.nan
    wrong = found + true - 2 * both
    neither = pixels - wrong - both
    shares = [right / (right + wrong) for right in (neither, both) if right + wrong]
    return sum(shares) / len(shares), 1 - wrong / pixels


def image_level(rows: Tensor, probability_N: Tensor | None = None) -> dict[str, float]:
    """How well images with something to find are told from those without.

    image_sensitivity, image_specificity: of calling an image positive if its found mask is not empty.
    image_auroc: of `probability_N`, where there is one for all images. NaN where a class is missing.
    """
    labels = (rows[:, TRUE] > 0).cpu().numpy()[:, None].astype(np.int8)
    called = (rows[:, FOUND] > 0).cpu().numpy()[:, None]
    found = {
        "image_sensitivity": decisions(called, labels).recall.item(),
        "image_specificity": ratio((~called & (labels == 0)).sum(), (labels == 0).sum()).item(),
    }
    if probability_N is not None and bool(probability_N.isfinite().all()):
        found["image_auroc"] = auroc(probability_N.double().cpu().numpy()[:, None], labels).item()
    return found
