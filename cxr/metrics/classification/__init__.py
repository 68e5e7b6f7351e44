"""Metrics of classifiers: ranking, calibration, decisions, and confidence intervals.

Everywhere, `scores_NF` are probabilities in [0, 1] and `labels_NF` are 1, 0 and −1 for unknown. Entries without a
known label are ignored. Metrics that cannot be measured are NaN. NumPy only, float64.
"""

from cxr.metrics.classification.calibration import Bins, brier, calibration_error, reliability
from cxr.metrics.classification.classification_summary import ClassificationSummary, FindingRow, summarize
from cxr.metrics.classification.delong import DeLong, delong
from cxr.metrics.classification.operating_points import OperatingPoint, operating_points
from cxr.metrics.classification.ranking import auroc, average_precision, sensitivity_at, specificity_counts
from cxr.metrics.classification.resampled_auroc import auroc_intervals, paired_gain
from cxr.metrics.classification.thresholds import (
    Criterion,
    Decisions,
    Thresholds,
    choose_thresholds,
    decisions,
    resampled_thresholds,
)

__all__ = [
    "Bins",
    "ClassificationSummary",
    "Criterion",
    "DeLong",
    "Decisions",
    "FindingRow",
    "OperatingPoint",
    "Thresholds",
    "auroc",
    "auroc_intervals",
    "average_precision",
    "brier",
    "calibration_error",
    "choose_thresholds",
    "decisions",
    "delong",
    "operating_points",
    "paired_gain",
    "reliability",
    "resampled_thresholds",
    "sensitivity_at",
    "specificity_counts",
    "summarize",
]
