"""Metrics of predicted boxes: localization accuracy, false positives, the pointing game, and their intervals.

An *image-finding pair* is an image with a ground-truth box of a finding. Predicted boxes of that finding are compared
with its ground-truth boxes in one frame, pixels of the original image. NumPy only, float64.
"""

from cxr.metrics.localization.baselines import baselines, center_boxes, random_boxes
from cxr.metrics.localization.box_arrays import Boxes
from cxr.metrics.localization.box_overlap import MEASURES, THRESHOLDS, Located, counts, known_places, locate
from cxr.metrics.localization.localization_accuracy import LocalizationRates, paired_gain, summarize

__all__ = [
    "MEASURES",
    "THRESHOLDS",
    "Boxes",
    "LocalizationRates",
    "Located",
    "baselines",
    "center_boxes",
    "counts",
    "known_places",
    "locate",
    "paired_gain",
    "random_boxes",
    "summarize",
]
