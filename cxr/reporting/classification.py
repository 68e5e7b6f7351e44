"""Tables of a classifier's metrics, and of two classifiers on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cxr import storage
from cxr.metrics.bootstrap import Intervals
from cxr.metrics.classification import ClassificationSummary, DeLong, FindingRow
from cxr.reporting.tables import Table, csv_text, interval, number

_SHARES = ("average_precision", "sensitivity", "brier", "calibration_error", "accuracy", "precision", "recall", "f1")
_COUNTS = ("positives", "negatives", "unknown")


def summary_table(summary: ClassificationSummary) -> Table:
    """One row for each finding, and their mean."""
    head = ["finding", "AUROC (95 %)", "AP", f"sens. at spec. {summary.specificity:g}", "Brier", "ECE"]
    head += ["accuracy", "precision", "recall", "F1", "positive", "negative", "unknown", "note"]
    return Table(head, [_cells(row) for row in (*summary.rows, summary.mean)])


def _cells(row: FindingRow) -> list[str]:
    shares = [number(getattr(row, name)) for name in _SHARES]
    counts = [f"{getattr(row, name):,}" for name in _COUNTS]
    return [row.finding, interval(row.auroc, row.auroc_low, row.auroc_high), *shares, *counts, row.note]


def summary_legend(summary: ClassificationSummary) -> str:
    """Explains the columns."""
    return (
        f"AUROC: area under the ROC curve; its 95 % interval is the percentile interval of {summary.resamples:,} "
        f"bootstrap resamples of patients with all of their images. AP: average precision. Sens.: the highest "
        f"sensitivity at a specificity of at least {summary.specificity:g}. Brier: mean squared error of the "
        f"probabilities. ECE: expected calibration error of the finding's probability in 15 bins of equal width. "
        f"Accuracy, precision, recall and F1 use the checkpoint's decision thresholds. A dash marks a metric that "
        f"cannot be measured. Means are over the findings with a value; counts are summed."
    )


def write_summary(summary: ClassificationSummary, out: str) -> str:
    """Write every column of the summary as OUT/findings.csv; returns its URI."""
    uri = storage.join(out, "findings.csv")
    storage.write_text(uri, csv_text([dataclasses.asdict(row) for row in (*summary.rows, summary.mean)]))
    return uri


def comparison_table(findings: Sequence[str], tested: DeLong, gain: Intervals) -> Table:
    """DeLong's test and the paired bootstrap for each finding, and the mean, which has no DeLong test."""
    head = ["finding", "AUROC", "other", "difference (95 %, DeLong)", "p", "difference (95 %, by patient)"]
    rows = [
        [
            finding,
            number(tested.auroc[f]),
            number(tested.other[f]),
            interval(tested.difference[f], tested.low[f], tested.high[f]),
            probability(tested.p[f]),
            interval(gain.value[f], gain.low[f], gain.high[f]),
        ]
        for f, finding in enumerate(findings)
    ]
    mean = interval(gain.mean, gain.mean_low, gain.mean_high)
    means = [number(_mean_of_known(values.tolist())) for values in (tested.auroc, tested.other)]
    return Table(head, [*rows, ["mean", *means, "", "", mean]])


def _mean_of_known(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def comparison_legend(gain: Intervals) -> str:
    """Explains the columns."""
    return (
        "DeLong's test treats images as independent and tests each finding separately: p is not corrected for the "
        f"number of findings. The last column is a bootstrap over patients with {gain.resamples:,} resamples; trust "
        "it rather than DeLong's test if patients have several images."
    )


def write_comparison(findings: Sequence[str], tested: DeLong, gain: Intervals, out: str) -> str:
    """Write the comparison as OUT/comparison.csv; returns its URI."""
    rows = [
        {"finding": finding, **{name: float(values[f]) for name, values in vars(tested).items()}}
        | {"low_by_patient": float(gain.low[f]), "high_by_patient": float(gain.high[f])}
        for f, finding in enumerate(findings)
    ]
    mean = dict.fromkeys(rows[0], float("nan")) | {
        "finding": "mean",
        "auroc": _mean_of_known(tested.auroc.tolist()),
        "other": _mean_of_known(tested.other.tolist()),
        "difference": gain.mean,
        "low_by_patient": gain.mean_low,
        "high_by_patient": gain.mean_high,
    }
    uri = storage.join(out, "comparison.csv")
    storage.write_text(uri, csv_text([*rows, mean]))
    return uri


def probability(p: float) -> str:
    """A p value for a table."""
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"
