"""Metrics of detectors: average precision of VOC and COCO, image-level scores, confusion matrices.

Predicted and ground-truth boxes are `metrics.localization.Boxes` in the same frame. The metric of a finding without
such boxes is NaN, and means ignore it. NumPy only, float64.
"""

from cxr.metrics.detection.box_meter import BoxMeter
from cxr.metrics.detection.detection_summary import (
    COCO_IOUS,
    FROC_RATES,
    VOC_IOUS,
    DetectionSummary,
    average_precisions,
    coco_average_precisions,
    missed_boxes,
    paired_gain,
    summarize,
    true_positives,
)
from cxr.metrics.detection.image_scores import confusion, image_labels, image_probabilities
from cxr.metrics.detection.precision import Curve

__all__ = [
    "COCO_IOUS",
    "FROC_RATES",
    "VOC_IOUS",
    "BoxMeter",
    "Curve",
    "DetectionSummary",
    "average_precisions",
    "coco_average_precisions",
    "confusion",
    "image_labels",
    "image_probabilities",
    "missed_boxes",
    "paired_gain",
    "summarize",
    "true_positives",
]
