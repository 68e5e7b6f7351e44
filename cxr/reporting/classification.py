"""What a classifier's summary looks like: tables of one model, and of two on the same images."""

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
    """A row a finding, the mean last."""
    head = ["finding", "AUROC (95 %)", "AP", f"sens. at spec. {summary.specificity:g}", "Brier", "ECE"]
    head += ["accuracy", "precision", "recall", "F1", "positive", "negative", "unknown", "note"]
    return Table(head, [_cells(row) for row in (*summary.rows, summary.mean)])


def _cells(row: FindingRow) -> list[str]:
    shares = [number(getattr(row, name)) for name in _SHARES]
    counts = [f"{getattr(row, name):,}" for name in _COUNTS]
    return [row.finding, interval(row.auroc, row.auroc_low, row.auroc_high), *shares, *counts, row.note]


def summary_legend(summary: ClassificationSummary) -> str:
    """What the columns mean, in Markdown."""
    return (
        f"AUROC: area under the ROC curve; its 95 % interval is the percentile interval of {summary.resamples:,} "
        f"bootstrap resamples of patients with all of their images. AP: average precision. Sens.: the highest "
        f"sensitivity at a specificity of at least {summary.specificity:g}. Brier: mean squared error of the "
        f"probabilities. ECE: expected calibration error of the finding's probability, 15 equally wide bins. "
        f"Accuracy, precision, recall and F1 are those of the decisions by the checkpoint's thresholds. A dash is "
        f"what could not be measured; the mean of a column is over the findings that it could measure, and counts "
        f"are summed."
    )


def write_summary(summary: ClassificationSummary, out: str) -> str:
    """Write every column of the summary as OUT/findings.csv; returns its URI."""
    uri = storage.join(out, "findings.csv")
    storage.write_text(uri, csv_text([dataclasses.asdict(row) for row in (*summary.rows, summary.mean)]))
    return uri


def comparison_table(findings: Sequence[str], tested: DeLong, gain: Intervals) -> Table:
    """DeLong's test and the paired bootstrap, a row a finding; the mean, which has no DeLong test, last."""
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
    """The mean of what is not NaN; NaN of nothing."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def comparison_legend(gain: Intervals) -> str:
    """What the columns mean, in Markdown."""
    return (
        "DeLong's test takes every image for a patient of its own and is made for each finding alone: p is not "
        f"corrected for the number of findings. The last column draws patients anew, {gain.resamples:,} times, and "
        "is the one to trust where patients have several images."
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
    """A p value to read."""
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"
