"""Overlap of predicted and ground-truth masks, from four counts per image: Dice, IoU, mean IoU, pixel accuracy.

Rows are int64 (N, 4): pixels of the intersection, of the predicted mask, of the ground-truth mask, of the image.
Images may have different sizes; rows of workers are gathered and then divided here.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cxr.metrics.bootstrap import ratio
from cxr.metrics.classification import auroc, decisions

INTERSECTION, PREDICTED, TRUE, PIXELS = range(4)


def overlap_rows(predicted_BHW: Tensor, true_BHW: Tensor) -> Tensor:
    """Rows of two stacks of bool masks, on their device, without a host sync."""
    assert predicted_BHW.dtype == true_BHW.dtype == torch.bool, "masks are decided before they are compared"
    assert predicted_BHW.shape == true_BHW.shape
    predicted, true = predicted_BHW.flatten(1), true_BHW.flatten(1)
    pixels = torch.full((len(predicted),), predicted.shape[1], device=predicted.device)
    return torch.stack([(predicted & true).sum(1), predicted.sum(1), true.sum(1), pixels], 1)


def dice(rows: Tensor) -> Tensor:
    """(N,) float64 2·|A∩B| / (|A| + |B|); 1 where both masks are empty."""
    intersection, predicted, true, _ = rows.double().unbind(1)
    return _or_one(2 * intersection, predicted + true)


def iou(rows: Tensor) -> Tensor:
    """(N,) float64 |A∩B| / |A∪B|; 1 where both masks are empty."""
    intersection, predicted, true, _ = rows.double().unbind(1)
    return _or_one(intersection, predicted + true - intersection)


def _or_one(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=1), 1.0)


def summary(rows: Tensor) -> dict[str, float]:
    """All overlap metrics of a set of images, NaN if they cannot be measured.

    dice, iou: means over images, where two empty masks count as 1; SIIM-ACR (2019) ranks by Dice. positive_dice: mean
    over the images with a ground-truth mask. empty_prediction_dice: the Dice of predicting only empty masks, which is
    the share of images without a ground-truth mask; compare dice with it. mean_iou, pixel_accuracy: over the pixels
    of all images together (Long et al. 2015); mean_iou is the mean of the IoU of background and target, or that of
    the background alone if no target exists or is predicted. images, positives: counts.
    """
    rows = rows.cpu()
    per_image, positive = dice(rows), rows[:, TRUE] > 0
    mean_iou, pixel_accuracy = _pooled(rows)
    return {
        "dice": per_image.mean().item(),
        "positive_dice": per_image[positive].mean().item(),
        "empty_prediction_dice": (~positive).double().mean().item(),
        "iou": iou(rows).mean().item(),
        "mean_iou": mean_iou,
        "pixel_accuracy": pixel_accuracy,
        "images": len(rows),
        "positives": int(positive.sum()),
    }


def _pooled(rows: Tensor) -> tuple[float, float]:
    """Mean IoU and pixel accuracy over all pixels together."""
    both, predicted, true, pixels = (int(total) for total in rows.sum(0))
    if not pixels:
        return math.nan, math.nan
    wrong = predicted + true - 2 * both
    neither = pixels - wrong - both
    shares = [right / (right + wrong) for right in (neither, both) if right + wrong]
    return sum(shares) / len(shares), 1 - wrong / pixels


def image_level(rows: Tensor, probability_N: Tensor | None = None) -> dict[str, float]:
    """Image-level detection: whether an image has a mask.

    image_sensitivity, image_specificity: of predicting an image as positive if its mask is not empty. image_auroc: of
    `probability_N`, if all images have one. NaN without both classes.
    """
    labels = (rows[:, TRUE] > 0).cpu().numpy()[:, None].astype(np.int8)
    predicted_positive = (rows[:, PREDICTED] > 0).cpu().numpy()[:, None]
    values = {
        "image_sensitivity": decisions(predicted_positive, labels).recall.item(),
        "image_specificity": ratio((~predicted_positive & (labels == 0)).sum(), (labels == 0).sum()).item(),
    }
    if probability_N is not None and bool(probability_N.isfinite().all()):
        values["image_auroc"] = auroc(probability_N.double().cpu().numpy()[:, None], labels).item()
    return values
