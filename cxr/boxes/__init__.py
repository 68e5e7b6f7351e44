"""Axis-aligned boxes: how they overlap, several models' boxes made one set, a filter of normal images.

Boxes are [x_min, y_min, x_max, y_max], edges at real numbers, in one frame for all that are compared: pixels
([0, width]) or shares of the image ([0, 1]). A box whose maximum does not lie beyond its minimum has no area and
overlaps nothing. NumPy alone, float64.
"""

from cxr.boxes.fusion import nms, nmw, soft_nms, wbf
from cxr.boxes.no_finding import filtered
from cxr.boxes.overlap import areas, intersections, iobb, iou, paired_iou
from cxr.boxes.predictions import Found

__all__ = [
    "Found",
    "areas",
    "filtered",
    "intersections",
    "iobb",
    "iou",
    "nms",
    "nmw",
    "paired_iou",
    "soft_nms",
    "wbf",
]
