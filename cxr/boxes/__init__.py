"""Axis-aligned boxes: overlap, fusion of several models' boxes, and a filter for normal images.

Boxes are [x_min, y_min, x_max, y_max] with real-valued edges, either in pixels ([0, width]) or as fractions of the
image ([0, 1]); boxes that are compared use the same units. A box whose maximum does not exceed its minimum has zero
area and overlaps nothing. Pure NumPy, float64.
"""

from cxr.boxes.fusion import nms, nmw, soft_nms, wbf
from cxr.boxes.no_finding import add_no_finding
from cxr.boxes.overlap import areas, intersections, iobb, iou, paired_iobb, paired_iou
from cxr.boxes.predictions import ScoredBoxes

__all__ = [
    "ScoredBoxes",
    "add_no_finding",
    "areas",
    "intersections",
    "iobb",
    "iou",
    "nms",
    "nmw",
    "paired_iobb",
    "paired_iou",
    "soft_nms",
    "wbf",
]
