"""The table of segmentation networks with values from papers, and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxr import schema
from cxr.benchmarks.studies.segmentation import SegmentationResult
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import palette
from cxr.reporting.tables import csv_text, interval, markdown, number

_COLORS: dict[str, str] = {
    model: palette.series(number) for number, model in enumerate(("unet", "small_unet", "fcn32s", "fcn16s", "fcn8s"))
}
# Long et al. 2015, arXiv 1411.4038: the tables of backbones and of skip connections.
_PAPER_HEAD = (
    "network",
    "mean IoU",
    "forward, ms",
    "conv. layers",
    "parameters, M",
    "receptive field, px",
    "max. stride",
)
_PAPER = (
    ("FCN-AlexNet", ".398", "50", "8", "57", "355", "32"),
    ("FCN-VGG16", ".560", "210", "16", "134", "404", "32"),
    ("FCN-GoogLeNet", ".425", "59", "22", "6", "907", "32"),
    ("FCN-32s, VGG16", ".594", "–", "–", "–", "–", "–"),
    ("FCN-16s, VGG16", ".624", "–", "–", "–", "–", "–"),
    ("FCN-8s, VGG16", ".627", "–", "–", "–", "–", "–"),
)
_EMPTY = (
    "Dice and IoU are means over images, where two empty masks count as 1. If every predicted mask is empty, Dice is "
    "{empty}."
)
_NOT_EMPTY = (
    "Dice and IoU are means over images. HD95 is the mean of the larger 95th percentile of boundary distances, over "
    "images whose predicted mask is not empty."
)
_LEGEND = (
    "{means} Mean IoU and pixel accuracy are computed over all pixels together. Intervals come from resampling "
    "patients. {timed} Depth, receptive field and stride are those of the path to the coarsest features, which in a "
    "U-Net is the encoder.{cut}\n"
)
_LONG = (
    "Long et al. (2015) report these values for 21 classes of objects in photographs (PASCAL VOC), with fully "
    "connected layers as convolutions:\n\n{table}"
)
_PUBLISHED = {  # by the masks' label
    schema.PNEUMOTHORAX: "On SIIM-ACR, a Dice of .843 and an IoU of .826 were reported for a U-Net on a ResNet "
    "(Jakhar et al. 2019), and the winner's ensemble had a Dice of .868 on the private test images.\n",
    schema.LUNGS: "Candemir et al. (2014) report an IoU of .941 on all images of Montgomery, with masks of similar "
    "images that were registered to each image.\n",
}


def table(results: Sequence[SegmentationResult]) -> str:
    """Markdown: one row per network. Columns that compare images with and without a mask are left out if all have
    one; then HD95 is a column."""
    columns = _columns(some_empty=not results[0].all_positive)
    return markdown(list(columns), [[cell(result) for cell in columns.values()] for result in results])


def _columns(*, some_empty: bool) -> dict[str, Callable[[SegmentationResult], str]]:
    """Heads of the columns, and what they show of a result."""

    def figure(name: str, digits: int = 3) -> Callable[[SegmentationResult], str]:
        return lambda result: number(result.figures.get(name, math.nan), digits)

    positives = {"Dice of positives (95 %)": lambda result: _interval(result.positive_dice)}
    return {
        "network": lambda result: result.name,
        "Dice (95 % by patient)": lambda result: _interval(result.dice),
        **(positives if some_empty else {}),
        "SD over seeds": lambda result: number(result.dice_sd),
        "IoU": figure("iou"),
        "mean IoU": figure("mean_iou"),
        "pixel accuracy": figure("pixel_accuracy", 4),
        **({"image AUROC": figure("image_auroc")} if some_empty else {"HD95, px": figure("hd95_px", 1)}),
        "forward, ms": lambda result: f"{result.forward_ms:.1f}",
        "parameters, M": lambda result: f"{result.architecture.parameters / 1e6:.1f}",
        "conv. layers": lambda result: f"{result.architecture.convolutions}",
        "receptive field, px": lambda result: f"{result.architecture.receptive_field_px:,}",
        "max. stride": lambda result: f"{result.architecture.stride_px}",
    }


def _interval(mean: MeanInterval) -> str:
    return interval(mean.value, mean.low, mean.high)


def page(results: Sequence[SegmentationResult], label: str, summary: str, timed: str, *, cut: bool) -> str:
    """The table with its legend and values from papers, in Markdown.

    Args:
        label: of the masks.
        summary: which images and seeds were used.
        timed: how the forward passes were timed.
        cut: whether AlexNet and VGG16 were used without their fully connected layers.
    """
    empty = number(results[0].figures["empty_prediction_dice"])
    means = _NOT_EMPTY if results[0].all_positive else _EMPTY.format(empty=empty)
    without = " AlexNet and VGG16 are used without their fully connected layers (fc6, fc7)." if cut else ""
    legend = _LEGEND.format(means=means, timed=timed, cut=without)
    long = _LONG.format(table=markdown(_PAPER_HEAD, _PAPER))
    return "\n".join([table(results), f"{summary}\n", legend, long, _PUBLISHED[label]])


def csv(results: Sequence[SegmentationResult]) -> str:
    """One row per network with all figures."""
    return csv_text([result.row() for result in results])


def picture(results: Sequence[SegmentationResult]) -> Figure:
    """One row per network, the best first: Dice of all images, Dice of images with a ground-truth mask if some have
    none, and the time of a forward pass."""
    by_positives = results[0].figures["positives"] > 0
    order = sorted(results, key=lambda result: (result.positive_dice if by_positives else result.dice).value)
    shown = {"dice": "mean Dice (95 %)"}
    if not results[0].all_positive:
        shown["dice"] += "\ndashed: only empty masks"
        shown["positive_dice"] = "mean Dice of images with\na ground-truth mask (95 %)"
    figure = Figure(figsize=(3 + 2.7 * (len(shown) + 1), 1.4 + 0.26 * len(order)), layout="constrained")
    *intervals, times = figure.subplots(1, len(shown) + 1, sharey=True)
    colors = [_COLORS.get(result.name.partition("-")[0], palette.NEUTRAL) for result in order]
    for axes, name in zip(intervals, shown, strict=True):
        for row, (result, color) in enumerate(zip(order, colors, strict=True)):
            mean: MeanInterval = getattr(result, name)
            axes.plot([mean.low, mean.high], [row] * 2, color=color, lw=2, alpha=0.4)
            axes.plot([mean.value], [row], "o", color=color, ms=6)
    times.barh(range(len(order)), [result.forward_ms for result in order], height=0.5, color=colors)
    times.bar_label(times.containers[0], fmt=" {:.0f}", fontsize=8)
    intervals[0].set_yticks(range(len(order)), [result.name for result in order], fontsize=8)
    if not results[0].all_positive:
        intervals[0].axvline(results[0].figures["empty_prediction_dice"], color=palette.NEUTRAL, ls="--", lw=1)
    intervals[0].set_ylim(-0.6, len(order) - 0.4)
    for axes, title in zip([*intervals, times], [*shown.values(), "forward, ms"], strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color=palette.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
