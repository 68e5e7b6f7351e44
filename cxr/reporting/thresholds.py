"""Tables of decision thresholds and of the decisions that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cxr.metrics.classification import OperatingPoint
from cxr.reporting.tables import Table, interval, number

SHARES = ("sensitivity", "specificity", "ppv", "npv")
_HEAD = ["sensitivity (95 %)", "specificity (95 %)", "PPV (95 %)", "NPV (95 %)"]


@dataclass(frozen=True)
class ChosenThreshold:
    """The threshold of one finding, and the decisions that it makes on the images it was chosen on."""

    finding: str
    value: float  # NaN if none could be chosen
    low: float  # 95 % interval by patient
    high: float
    point: OperatingPoint  # of the new threshold
    before: OperatingPoint  # of the run's own decisions
    patients: int  # with a known label
    note: str  # why none could be chosen


def points_table(points: Sequence[OperatingPoint], values: Sequence[float], findings: Sequence[str]) -> Table:
    """A row for each finding, with counts of images, and shares with intervals.

    Args:
        values: the thresholds, NaN if they are not known.
    """
    rows = [
        [finding, number(value), *_cells(point)]
        for finding, value, point in zip(findings, values, points, strict=True)
    ]
    return Table(["finding", "threshold", *_HEAD, "TP", "FP", "FN", "TN"], rows)


def points_legend(resamples: int) -> str:
    """Explains `points_table`."""
    return (
        "An image is positive if its value is at least the threshold. PPV and NPV: positive and negative predictive "
        "value, which depend on how frequent the finding is in this archive. TP, FP, FN, TN: numbers of true "
        f"positive, false positive, false negative and true negative images. Intervals are percentile intervals of "
        f"{resamples:,} bootstrap resamples of patients. Thresholds that are chosen on the same images look better "
        f"than they are."
    )


def _cells(point: OperatingPoint) -> list[str]:
    shares = (getattr(point, name) for name in SHARES)
    counts = (point.true_positives, point.false_positives, point.false_negatives, point.true_negatives)
    return [*(interval(of.value, of.low, of.high) for of in shares), *(f"{count:,}" for count in counts)]


def comparison_table(chosen: Sequence[ChosenThreshold]) -> Table:
    """New thresholds and their decisions beside those of the run."""
    head = ["finding", "threshold (95 %)", "positive", "negative", *_HEAD[:3], "sensitivity before"]
    head += ["specificity before", "note"]
    rows = []
    for each in chosen:
        point, before = each.point, each.before
        positives, negatives = (
            point.true_positives + point.false_negatives,
            point.true_negatives + point.false_positives,
        )
        shares = [interval(of.value, of.low, of.high) for of in (point.sensitivity, point.specificity, point.ppv)]
        rows.append(
            [
                each.finding,
                interval(each.value, each.low, each.high),
                f"{positives:,}",
                f"{negatives:,}",
                *(shares if not each.note else ["–"] * 3),
                number(before.sensitivity.value),
                number(before.specificity.value),
                each.note and f"not chosen: {each.note}",
            ]
        )
    return Table(head, rows)
