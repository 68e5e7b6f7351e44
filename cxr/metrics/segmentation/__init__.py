"""Metrics of predicted masks: overlap, boundary distances, and whether anything was predicted at all.

Counts and distances are taken image by image, gathered over workers as rows, and divided once. What cannot be
measured is NaN, never a guess.
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
