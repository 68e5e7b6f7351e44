"""The table of segmentation networks with values from papers, and its picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxr.benchmarks.studies.segmentation import SegmentationResult
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import palette
from cxr.reporting.tables import csv_text, interval, markdown, number

_COLORS: dict[str, str] = {
    model: palette.series(number) for number, model in enumerate(("unet", "small_unet", "fcn32s", "fcn16s", "fcn8s"))
}
_HEAD = (
    "network",
    "Dice (95 % by patient)",
    "Dice of positives (95 %)",
    "SD over seeds",
    "IoU",
    "mean IoU",
    "pixel accuracy",
    "image AUROC",
    "forward, ms",
    "parameters, M",
    "conv. layers",
    "receptive field, px",
    "max. stride",
)
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
_LEGEND = (
    "Dice and IoU are means over images, where two empty masks count as 1. If every predicted mask is empty, Dice is "
    "{empty}. Mean IoU and pixel accuracy are computed over all pixels together. Intervals come from resampling "
    "patients. {timed} Depth, receptive field and stride are those of the path to the coarsest features, which in a "
    "U-Net is the encoder.{cut}\n"
)
_PAPERS = (
    "Long et al. (2015) report these values for 21 classes of objects in photographs (PASCAL VOC), with fully "
    "connected layers as convolutions:\n\n{table}\nOn SIIM-ACR, a Dice of .843 and an IoU of .826 were reported for "
    "a U-Net on a ResNet (Jakhar et al. 2019), and the winner's ensemble had a Dice of .868 on the private test "
    "images.\n"
)


def table(results: Sequence[SegmentationResult]) -> str:
    """Markdown: one row per network."""
    return markdown(_HEAD, [_cells(result) for result in results])


def _cells(result: SegmentationResult) -> list[str]:
    figures, architecture = result.figures, result.architecture
    return [
        result.name,
        _interval(result.dice),
        _interval(result.positive_dice),
        number(result.dice_sd),
        *(number(figures[name]) for name in ("iou", "mean_iou")),
        number(figures["pixel_accuracy"], 4),
        number(figures.get("image_auroc", float("nan"))),
        f"{result.forward_ms:.1f}",
        f"{architecture.parameters / 1e6:.1f}",
        f"{architecture.convolutions}",
        f"{architecture.receptive_field_px:,}",
        f"{architecture.stride_px}",
    ]


def _interval(mean: MeanInterval) -> str:
    return interval(mean.value, mean.low, mean.high)


def page(results: Sequence[SegmentationResult], summary: str, timed: str, *, cut: bool) -> str:
    """The table with its legend and values from papers, in Markdown.

    Args:
        said: which images and seeds were used.
        timed: how the forward passes were timed.
        cut: whether AlexNet and VGG16 were used without their fully connected layers.
    """
    empty = number(results[0].figures["empty_prediction_dice"])
    without = " AlexNet and VGG16 are used without their fully connected layers (fc6, fc7)." if cut else ""
    legend = _LEGEND.format(empty=empty, timed=timed, cut=without)
    return "\n".join([table(results), f"{summary}\n", legend, _PAPERS.format(table=markdown(_PAPER_HEAD, _PAPER))])


def csv(results: Sequence[SegmentationResult]) -> str:
    """One row per network with all figures."""
    return csv_text([result.row() for result in results])


def picture(results: Sequence[SegmentationResult]) -> Figure:
    """One row per network, the best first: Dice of all images, Dice of images with a true mask, forward time."""
    order = sorted(results, key=lambda result: result.positive_dice.value)
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(order)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    colors = [_COLORS.get(result.name.partition("-")[0], palette.NEUTRAL) for result in order]
    for axes, name in zip(panels, ("dice", "positive_dice"), strict=False):
        for row, (result, color) in enumerate(zip(order, colors, strict=True)):
            mean: MeanInterval = getattr(result, name)
            axes.plot([mean.low, mean.high], [row] * 2, color=color, lw=2, alpha=0.4)
            axes.plot([mean.value], [row], "o", color=color, ms=6)
    panels[2].barh(range(len(order)), [result.forward_ms for result in order], height=0.5, color=colors)
    panels[2].bar_label(panels[2].containers[0], fmt=" {:.0f}", fontsize=8)
    panels[0].set_yticks(range(len(order)), [result.name for result in order], fontsize=8)
    panels[0].axvline(results[0].figures["empty_prediction_dice"], color=palette.NEUTRAL, ls="--", lw=1)
    panels[0].set_ylim(-0.6, len(order) - 0.4)
    titles = (
        "mean Dice (95 %); dashed: only empty masks",
        "of images with a ground-truth mask (95 %)",
        "forward, ms",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color=palette.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
