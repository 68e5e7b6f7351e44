"""Distance between the outlines of predicted and ground-truth masks: HD95, exact, for pixels of any shape."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from torch import Tensor

PERCENTILE = 95
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_SPARSE = 50  # pixels of the picture for each of an outline, above which a k-d tree is faster


def hd95(predicted_HW: np.ndarray, true_HW: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """95 % Hausdorff distance of two bool masks; NaN if either is empty.

    The larger of two 95th percentiles (as in Maier-Hein et al. 2024, Metrics reloaded): those of the distances from
    each boundary pixel of one mask to the nearest boundary pixel of the other, in both directions. A boundary pixel
    is a pixel of the mask with at least one of its four neighbors outside of the mask or of the image.

    Args:
        spacing: distance of pixel centers between rows and between columns, in the unit of the result: (1, 1) for
            pixels, the image's spacing for mm.
    """
    window = _window(predicted_HW | true_HW)
    predicted, true = (boundary(mask[window]) for mask in (predicted_HW, true_HW))
    if not predicted.any() or not true.any():
        return math.nan
    return max(
        float(np.percentile(distances(*pair, spacing), PERCENTILE)) for pair in ((predicted, true), (true, predicted))
    )


def hd95_rows(predicted_BHW: Tensor, true_BHW: Tensor) -> Tensor:
    """(B,) float64 on the CPU: `hd95` in pixels of each pair of bool masks; NaN where either is empty."""
    pairs = zip(predicted_BHW.cpu().numpy(), true_BHW.cpu().numpy(), strict=True)
    return torch.tensor([hd95(predicted, true) for predicted, true in pairs], dtype=torch.float64)


def boundary(mask_HW: np.ndarray) -> np.ndarray:
    """Bool (H, W): the pixels of the mask that share an edge with a pixel outside of it."""
    if not mask_HW.size:
        return mask_HW
    inside = cv2.erode(mask_HW.astype(np.uint8), _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask_HW & (inside == 0)


def distances(from_HW: np.ndarray, to_HW: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """(N,) distance of each pixel of one mask to the nearest pixel of the other, which is not empty; both bool.

    For few pixels, such as outlines, a k-d tree is faster than distance transforms of the whole picture. Of those,
    OpenCV's is several times faster than SciPy's, but supports only square pixels. They agree within 1e-5 pixels.
    """
    if _SPARSE * (np.count_nonzero(from_HW) + np.count_nonzero(to_HW)) < from_HW.size:
        return KDTree(np.argwhere(to_HW) * spacing).query(np.argwhere(from_HW) * spacing)[0]
    y_spacing, x_spacing = spacing
    if y_spacing == x_spacing:
        elsewhere = (~to_HW).astype(np.uint8)
        return cv2.distanceTransform(elsewhere, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[from_HW] * y_spacing
    return distance_transform_edt(~to_HW, sampling=spacing)[from_HW]  # pyright: ignore[reportOptionalSubscript, reportCallIssue, reportArgumentType]


def _window(mask_HW: np.ndarray) -> tuple[slice, slice]:
    """The smallest window that contains all pixels of a mask; empty for an empty mask."""
    places = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    y, x = (slice(place[0], place[-1] + 1) if len(place) else slice(0) for place in places)
    return y, x
