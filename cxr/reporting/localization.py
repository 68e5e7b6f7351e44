"""Tables and figures of localization: accuracy by threshold, false positives, the pointing game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr.metrics.bootstrap import Intervals
from cxr.metrics.classification.classification_summary import FEW
from cxr.metrics.localization import MEASURES, THRESHOLDS, LocalizationRates
from cxr.reporting import palette
from cxr.reporting.tables import Table, csv_text, interval, number
from cxr.wording import counted

NAMED = {"iou": "IoU", "iobb": "IoBB"}
SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)  # thresholds in the page's tables; the CSV has all


def accuracy_table(rates: LocalizationRates, baselines: Mapping[str, LocalizationRates], measure: str) -> Table:
    """One row for each finding, the mean, then the baselines' means; one column for each threshold."""
    head = ["finding", "images with a box", *(f"T({NAMED[measure]}) = {at:.1f}" for at in SHOWN), "note"]
    shown = [rates.at(measure, at) for at in SHOWN]
    rows = [
        [finding, f"{rates.pairs[f]:,}", *(_of_finding(rates, of, f) for of in shown), _few(int(rates.patients[f]))]
        for f, finding in enumerate(rates.findings)
    ]
    rows.append(["mean", f"{rates.pairs.sum():,}", *(_mean(of) for of in shown), ""])
    rows += [
        [f"{name}: mean", "", *(_mean(of.at(measure, at)) for at in SHOWN), ""] for name, of in baselines.items()
    ]
    return Table(head, rows)


def false_positives_table(rates: LocalizationRates, baselines: Mapping[str, LocalizationRates]) -> Table:
    """False positives per image at some IoU thresholds, and the pointing game."""
    head = ["finding", "images", *(f"T(IoU) = {at:.1f}" for at in SHOWN), "pointing game (95 %)"]
    shown = [THRESHOLDS.index(at) for at in SHOWN]
    rows = [
        [
            finding,
            f"{rates.images[f]:,}",
            *(number(rates.false_positives["iou"][at].value[f], 2) for at in shown),
            _of_finding(rates, rates.pointing, f),
        ]
        for f, finding in enumerate(rates.findings)
    ]
    for name, of in {"mean": rates, **{f"{name}: mean": of for name, of in baselines.items()}}.items():
        rows.append([name, "", *(number(of.false_positives["iou"][at].mean, 2) for at in shown), _mean(of.pointing)])
    return Table(head, rows)


def _of_finding(rates: LocalizationRates, of: Intervals, f: int) -> str:
    """With its interval if there is more than one patient."""
    return interval(of.value[f], of.low[f], of.high[f], 2) if rates.patients[f] > 1 else number(of.value[f], 2)


def _mean(of: Intervals) -> str:
    return interval(of.mean, of.mean_low, of.mean_high, 2)


def _few(patients: int) -> str:
    if patients >= FEW:
        return ""
    return f"{counted(patients, 'patient')} with a box: too few to trust the interval"


def legend(rates: LocalizationRates, resamples: int) -> str:
    """Explains the metrics and what they cannot show."""
    few = sum(int(patients) < FEW for patients in rates.patients)
    trust = (
        f" {few} of {len(rates.findings)} findings have boxes in fewer than {FEW} patients: neither their values "
        f"nor the mean, in which all findings have the same weight, can distinguish two networks or be compared with "
        f"published values."
        if few
        else ""
    )
    return (
        "A finding with a ground-truth box in an image is localized at T(IoU) if one of its predicted boxes has an "
        "intersection over union (IoU) above T with one of its ground-truth boxes. It is localized at T(IoBB) if the "
        "intersection is more than T of the area of the predicted box (Wang et al. 2017). Boxes of any score count. "
        "False positives per image: the number of predicted boxes without such an overlap, divided by the number of "
        "images in which all boxes of the finding are known. These are the images with a ground-truth box of the "
        "finding, and those labeled as not showing it. Pointing game: share of images in which the center of the box "
        "with the highest score lies in a ground-truth box. The baseline `random` predicts one box per image and "
        "finding, with the size of a training box, at a random position; `center` predicts the mean training box. "
        "Without training boxes, the sides of `random` are 1/16 to 1/2 of the image, and `center` is the middle half "
        f"of the image. Intervals are percentile intervals of {resamples:,} bootstrap resamples of patients with all "
        f"of their images.{trust}\n"
    )


def gain_table(gains: Mapping[str, Sequence[Intervals]]) -> Table:
    """How much higher the mean accuracy of one run is than another's on the same images."""
    rows = [
        [f"{NAMED[name]} > {at:.1f}", interval(of.mean, of.mean_low, of.mean_high)]
        for name in MEASURES
        for at, of in zip(THRESHOLDS, gains[name], strict=True)
    ]
    return Table(["mean accuracy", "this run minus the other (95 %)"], rows)


def csv(named: Mapping[str, LocalizationRates]) -> str:
    """All metrics: one row for each source of boxes, finding, measure and threshold; the mean is a finding."""
    return csv_text([row for name, rates in named.items() for row in _csv_rows(name, rates)])


def _csv_rows(name: str, rates: LocalizationRates) -> list[dict[str, Any]]:
    rows = []
    for measure in MEASURES:
        for at, localized, false_positives in zip(
            THRESHOLDS, rates.accuracy[measure], rates.false_positives[measure], strict=True
        ):
            head = {"boxes": name, "measure": measure, "threshold": at}
            for f, finding in enumerate(rates.findings):
                rows.append(
                    head
                    | {"finding": finding, "pairs": int(rates.pairs[f]), "images": int(rates.images[f])}
                    | {"accuracy": localized.value[f], "low": localized.low[f], "high": localized.high[f]}
                    | {
                        "false_positives": false_positives.value[f],
                        "fp_low": false_positives.low[f],
                        "fp_high": false_positives.high[f],
                    }
                )
            rows.append(
                head
                | {"finding": "mean", "pairs": int(rates.pairs.sum()), "images": ""}
                | {"accuracy": localized.mean, "low": localized.mean_low, "high": localized.mean_high}
                | {
                    "false_positives": false_positives.mean,
                    "fp_low": false_positives.mean_low,
                    "fp_high": false_positives.mean_high,
                }
            )
    return [
        {key: float(value) if isinstance(value, np.floating) else value for key, value in r.items()} for r in rows
    ]


def curves_figure(rates: LocalizationRates, baselines: Mapping[str, LocalizationRates]) -> Figure:
    """Accuracy against the IoU and IoBB threshold: each finding, the mean with its interval, and the baselines."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for f, finding in enumerate(rates.findings):
            values = [of.value[f] for of in rates.accuracy[measure]]
            axes.plot(THRESHOLDS, values, lw=1, color=palette.series(f), ls="-" if f < 10 else ":", label=finding)
        curves(axes, rates, measure, "mean", "black")
        for (name, of), style in zip(baselines.items(), ("--", ":"), strict=False):
            means = [at.mean for at in of.accuracy[measure]]
            axes.plot(THRESHOLDS, means, color=palette.NEUTRAL, ls=style, lw=1.5, label=f"{name}, mean")
        tidy(axes, measure)
    panels[0].set_ylabel("localization accuracy")
    panels[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves(axes: Axes, rates: LocalizationRates, measure: str, name: str, color: str) -> None:
    """The mean accuracy over findings against the threshold, with its interval."""
    means = rates.accuracy[measure]
    axes.plot(THRESHOLDS, [of.mean for of in means], color=color, lw=2, label=name)
    low, high = [of.mean_low for of in means], [of.mean_high for of in means]
    axes.fill_between(THRESHOLDS, low, high, color=color, alpha=0.12, lw=0)


def tidy(axes: Axes, measure: str) -> None:
    axes.set(xlabel=f"threshold on {NAMED[measure]}", ylim=(0, 1), xlim=(THRESHOLDS[0], THRESHOLDS[-1]))
    axes.grid(color=palette.GRID)
    axes.spines[["top", "right"]].set_visible(False)
