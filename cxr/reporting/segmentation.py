"""Tables of mask metrics, over all images and by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cxr import storage
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import palette
from cxr.reporting.figures import new_figure
from cxr.reporting.tables import Table, csv_text, interval, number

_WORST = 10  # images in the page's table


def summary_table(predicted: Mapping[str, float], intervals: Mapping[str, MeanInterval]) -> Table:
    """One row for each metric, with its confidence interval if there is one."""
    named = [(title, name) for name, title in _TITLES.items() if name in predicted]
    return Table(["metric", "value (95 %)"], [[title, _cell(name, predicted, intervals)] for title, name in named])


_TITLES = {
    "dice": "mean Dice (two empty masks count as 1)",
    "empty_prediction_dice": "mean Dice if all predicted masks were empty",
    "positive_dice": "mean Dice of images with a ground-truth mask",
    "iou": "mean IoU (two empty masks count as 1)",
    "mean_iou": "mean IoU of background and target, over all pixels",
    "pixel_accuracy": "pixel accuracy",
    "hd95_px": "HD95, px",
    "hd95_mm": "HD95, mm",
    "image_auroc": "image-level AUROC",
    "image_sensitivity": "image-level sensitivity (mask not empty)",
    "image_specificity": "image-level specificity (mask not empty)",
}


def _cell(name: str, predicted: Mapping[str, float], intervals: Mapping[str, MeanInterval]) -> str:
    digits = 1 if name.startswith("hd95") else 3
    if name in intervals:
        return interval(predicted[name], intervals[name].low, intervals[name].high, digits)
    return number(predicted[name], digits)


def summary_legend(resolution: str, resamples: int, counts: Mapping[str, int]) -> str:
    """Explains the metrics."""
    measured, in_mm, one_empty = (f"{counts[name]:,}" for name in ("hd95_images", "hd95_mm_images", "hd95_one_empty"))
    return (
        f"Masks are compared at {resolution}. Intervals are percentile intervals of {resamples:,} bootstrap "
        "resamples of patients with all of their images. Compare mean Dice with that of empty masks, which is the "
        "share of images without a ground-truth mask. Mean IoU over all pixels is that of Long et al. (2015). HD95 "
        "is the larger of the two 95th percentiles of the distances between the outlines. It is a mean over the "
        f"{measured} images in which neither mask is empty; in millimeters, over the {in_mm} of them with a known "
        f"pixel spacing. It does not include {one_empty} images in which only one of the masks is empty. A dash "
        "marks a metric that cannot be measured."
    )


def dice_figure(dice_N: np.ndarray, positive_N: np.ndarray) -> Figure:
    """Histogram of the Dice of the images with a ground-truth mask, and of those without, if there are any."""
    kinds = {"with a ground-truth mask": positive_N, "without": ~positive_N}
    shown = {name: dice_N[of] for name, of in kinds.items() if of.any()}
    figure = new_figure(4.2 * len(shown) + 0.2, 2.8)
    for ax, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        ax.hist(values, bins=25, range=(0, 1), color=palette.MODEL)
        ax.axvline(float(np.median(values)), color=palette.MARK, linewidth=1.2)
        ax.set_title(f"{len(values):,} images {name}; median {np.median(values):.3f}", fontsize=9)
        ax.set_xlabel("Dice", fontsize=8)
        ax.set_ylabel("images", fontsize=8)
        ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def area_figure(predicted_N: np.ndarray, true_N: np.ndarray) -> Figure:
    """Areas of masks that are not empty, as shares of the image: distributions; predicted against ground truth."""
    figure = new_figure(8.6, 3.2)
    bars, points = figure.subplots(1, 2)
    both = np.concatenate([predicted_N[predicted_N > 0], true_N[true_N > 0]])
    low, high = (float(np.log10(end)) for end in (both.min() / 1.2, both.max() * 1.2))
    within_a_decade = high - low < 1.5  # in which the axis may have no power of ten
    bins = np.logspace(low, high, 26)
    bars.hist(predicted_N[predicted_N > 0], bins, color=palette.PREDICTION, alpha=0.6, label="prediction")
    bars.hist(true_N[true_N > 0], bins, histtype="step", color=palette.TRUTH, linewidth=1.6, label="ground truth")
    bars.set_ylabel("images", fontsize=8)
    bars.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    bars.legend(fontsize=7, frameon=False)
    common = (predicted_N > 0) & (true_N > 0)
    points.plot([10**low, 10**high], [10**low, 10**high], color=palette.NEUTRAL, linewidth=0.8, linestyle="--")
    points.plot(true_N[common], predicted_N[common], ".", color=palette.MODEL, markersize=4, alpha=0.6)
    points.set(xlim=(10**low, 10**high), ylim=(10**low, 10**high), yscale="log", aspect="equal")
    points.set_ylabel("area of the predicted mask", fontsize=8)
    names = ("area of the mask, share of the image", "area of the ground-truth mask")
    for ax, name in zip((bars, points), names, strict=True):
        ax.set_xscale("log")
        ax.set_xlabel(f"{name}, log scale", fontsize=8)
        for axis in (ax.xaxis, points.yaxis):
            if within_a_decade:
                axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
            axis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def gain_table(gains: Mapping[str, MeanInterval]) -> Table:
    """Difference between two runs on the same images, with intervals by patient."""
    named = {"dice_gain": "mean Dice", "positive_dice_gain": "mean Dice of images with a ground-truth mask"}
    rows = [[named[name], interval(gain.value, gain.low, gain.high)] for name, gain in gains.items()]
    return Table(["difference", "this run minus the other (95 %)"], rows)


def write_images(rows: Sequence[Mapping[str, Any]], out: str) -> str:
    """Write the metrics of all images, the worst first, as OUT/images.csv; returns its URI."""
    uri = storage.join(out, "images.csv")
    storage.write_text(uri, csv_text(rows))
    return uri


def worst_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first of the rows that `write_images` takes."""
    head = ["rank", "image", "Dice", "IoU", "HD95, px", "predicted, px", "ground truth, px"]
    cells = [
        [
            str(row["rank"]),
            row["image_id"],
            number(row["dice"]),
            number(row["iou"]),
            number(row["hd95_px"], 1),
            f"{row['predicted_px']:,}",
            f"{row['ground_truth_px']:,}",
        ]
        for row in rows[:_WORST]
    ]
    return Table(head, cells)


def siim_submission(codes: Mapping[str, str]) -> str:
    """The CSV that SIIM-ACR (2019) expects: one row for each image with its mask as relative RLE, "-1" if empty."""
    return csv_text([{"ImageId": name, "EncodedPixels": code} for name, code in codes.items()])
