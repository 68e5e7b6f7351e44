"""Metrics of detectors: average precision of VOC and COCO, images as a whole, confusions.

Boxes are `metrics.localization.Boxes` of both sides in one frame. A finding without a true box cannot be measured:
it is NaN and no mean counts it. NumPy alone, float64.
"""

from cxr.metrics.detection.box_meter import BoxMeter
from cxr.metrics.detection.detection_summary import (
    COCO_IOUS,
    VOC_IOUS,
    DetectionSummary,
    average_precisions,
    coco_average_precisions,
    paired_gain,
    summarize,
    true_positives,
)
from cxr.metrics.detection.image_scores import confusion, image_labels, image_probabilities
from cxr.metrics.detection.precision import Curve

__all__ = [
    "COCO_IOUS",
    "VOC_IOUS",
    "BoxMeter",
    "Curve",
    "DetectionSummary",
    "average_precisions",
    "coco_average_precisions",
    "confusion",
    "image_labels",
    "image_probabilities",
    "paired_gain",
    "summarize",
    "true_positives",
]
