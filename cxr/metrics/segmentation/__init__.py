"""Metrics of predicted masks: overlap, boundary distances, and image-level detection.

Counts and distances are computed per image, gathered over workers as rows, and divided once. Metrics that cannot be
measured are NaN.
"""

from cxr.metrics.segmentation.boundary import hd95, hd95_rows
from cxr.metrics.segmentation.overlap_metrics import dice, image_level, iou, overlap_rows, summary

__all__ = [
    "dice",
    "hd95",
    "hd95_rows",
    "image_level",
    "iou",
    "overlap_rows",
    "summary",
]
