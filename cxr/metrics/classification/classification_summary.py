"""All metrics of a classifier on one set of images: a row per finding, and their mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES
from cxr.metrics.classification.calibration import brier, calibration_error
from cxr.metrics.classification.ranking import average_precision, sensitivity_at
from cxr.metrics.classification.resampled_auroc import auroc_intervals
from cxr.metrics.classification.thresholds import decisions, missing_class
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN

FEW = 10  # number of patients with or without a finding below which an interval cannot be trusted
_COUNTS = ("positives", "negatives", "unknown", "resamples_left_out")


@dataclass(frozen=True)
class FindingRow:
    """One finding, or the mean over findings; shares in [0, 1], NaN for what cannot be measured."""

    finding: str
    positives: int = 0  # images
    negatives: int = 0
    unknown: int = 0
    auroc: float = math.nan
    auroc_low: float = math.nan  # 95 % interval by bootstrap over patients
    auroc_high: float = math.nan
    average_precision: float = math.nan
    sensitivity: float = math.nan  # at `ClassificationSummary.specificity`
    brier: float = math.nan
    calibration_error: float = math.nan
    accuracy: float = math.nan  # this and the next three are metrics of the decisions
    precision: float = math.nan
    recall: float = math.nan
    f1: float = math.nan
    resamples_left_out: int = 0  # without both classes; for the mean: those that lack a finding
    note: str = ""


@dataclass(frozen=True)
class ClassificationSummary:
    """Rows in the order of the findings, and the mean of each column over the findings with a value."""

    rows: list[FindingRow]
    mean: FindingRow
    images: int
    patients: int
    resamples: int
    specificity: float

    @property
    def measured(self) -> list[FindingRow]:
        """Rows with an AUROC."""
        return [row for row in self.rows if math.isfinite(row.auroc)]


def summarize(
    scores_NF: np.ndarray,
    labels_NF: np.ndarray,
    predicted_positive_NF: np.ndarray,
    patients_N: np.ndarray,
    findings: Sequence[str],
    *,
    specificity: float = 0.9,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClassificationSummary:
    """Evaluate probabilities and the decisions `predicted_positive_NF` (1 or True: positive) made from them."""
    intervals = auroc_intervals(scores_NF, labels_NF, patients_N, resamples=resamples, seed=seed)
    columns = {
        **{name: (np.asarray(labels_NF) == kind).sum(0) for name, kind in _KINDS.items()},
        "auroc": intervals.value,
        "auroc_low": intervals.low,
        "auroc_high": intervals.high,
        "average_precision": average_precision(scores_NF, labels_NF),
        "sensitivity": sensitivity_at(scores_NF, labels_NF, specificity),
        "brier": brier(scores_NF, labels_NF),
        "calibration_error": calibration_error(scores_NF, labels_NF),
        **vars(decisions(predicted_positive_NF, labels_NF)),
        "resamples_left_out": intervals.left_out,
        "note": _notes(np.asarray(labels_NF), np.asarray(patients_N)),
    }
    plain = {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in columns.items()}
    rows = [
        FindingRow(finding, **{name: values[f] for name, values in plain.items()})
        for f, finding in enumerate(findings)
    ]
    mean = dataclasses.replace(
        mean_row(rows),
        auroc_low=intervals.mean_low,
        auroc_high=intervals.mean_high,
        resamples_left_out=intervals.mean_incomplete,
    )
    patients = len(np.unique(np.asarray(patients_N)))
    return ClassificationSummary(rows, mean, len(np.asarray(labels_NF)), patients, resamples, specificity)


_KINDS = {"positives": POSITIVE, "negatives": NEGATIVE, "unknown": UNKNOWN}


def mean_row(rows: Sequence[FindingRow]) -> FindingRow:
    """Means of the shares over the rows with a value, and sums of the counts; the mean has no interval here."""
    measured = sum(math.isfinite(row.auroc) for row in rows)
    values: dict[str, float] = {}
    for field in dataclasses.fields(FindingRow)[1:-1]:
        known = [value for row in rows if math.isfinite(value := getattr(row, field.name))]
        if field.name in _COUNTS:
            values[field.name] = sum(known)
        elif known and field.name not in ("auroc_low", "auroc_high"):
            values[field.name] = sum(known) / len(known)
    return FindingRow("mean", **values, note=f"AUROC of {measured} of {len(rows)} findings")  # pyright: ignore[reportArgumentType]


def _notes(labels_NF: np.ndarray, patients_N: np.ndarray) -> list[str]:
    return [_note(labels_NF[:, f], patients_N) for f in range(labels_NF.shape[1])]


def _note(labels_N: np.ndarray, patients_N: np.ndarray) -> str:
    """Why a finding cannot be measured, or why its interval cannot be trusted; empty otherwise."""
    missing = missing_class(int((labels_N == POSITIVE).sum()), int((labels_N == NEGATIVE).sum()))
    if missing:
        return missing
    for kind, name in ((POSITIVE, "with"), (NEGATIVE, "without")):
        patients = len(np.unique(patients_N[labels_N == kind]))
        if patients < FEW:
            return f"{patients} patient{'s' * (patients != 1)} {name} it: too few to trust the interval"
    return ""
