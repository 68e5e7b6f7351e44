"""Pictures of a comparison of aligners: mean images, mean lungs, and outlines of the lungs in single images."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from cxr.benchmarks.studies.align import AlignmentComparison, Masked, warp_masks
from cxr.metrics.alignment import off_diagonal_mean
from cxr.models.spatial_transformer import warp
from cxr.reporting import figures

COLUMNS = 8  # images outlined


def save_pictures(images: Masked, comparison: AlignmentComparison, folder: str, ending: str = "") -> list[str]:
    """mean_image, mean_lungs and outlines, each followed by `ending`, as PNG in the URI `folder`; their URIs."""
    chosen = torch.linspace(0, len(images) - 1, min(COLUMNS, len(images))).round().long().tolist()
    mean_image, mean_lungs, outlined = {}, {}, {}
    for method, theta in comparison.theta.items():
        x_BHW = warp(images.pixels[:, None].float() / 255, theta)[:, 0].numpy()
        masks_BHW = warp_masks(images.masks, theta).numpy()
        mean_image[method] = x_BHW.mean(0)
        mean_lungs[f"{method}, IoU {float(off_diagonal_mean(comparison.iou[method])):.3f}"] = masks_BHW.mean(0)
        outlined[method] = np.stack([outlined_lungs(x_BHW[i], masks_BHW[i]) for i in chosen])
    figures_by_name = {
        "mean_image": figures.pictures(mean_image),
        "mean_lungs": figures.pictures(mean_lungs),
        "outlines": figures.picture_rows(outlined, [images.image_ids[i] for i in chosen]),
    }
    return [figures.save_figure(figure, folder, f"{name}{ending}.png") for name, figure in figures_by_name.items()]


def outlined_lungs(picture_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A copy of a picture in [0, 1] with the edge of the bool mask in white, two pixels wide, inside of it."""
    inner = cv2.erode(mask_HW.astype(np.uint8), np.ones((5, 5), np.uint8))
    return np.where(mask_HW & (inner == 0), 1.0, picture_HW)
