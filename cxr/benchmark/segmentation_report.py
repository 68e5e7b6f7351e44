"""The table of networks that find masks, beside what papers give, and its picture: Dice against forward time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from cxr.benchmark.segmentation import Judged
from cxr.metrics.segmentation import MeanInterval
from cxr.report.tables import csv_text, interval, markdown, number

_COLOURS = {"unet": "#31688e", "small_unet": "#26828e", "fcn32s": "#fdae61", "fcn16s": "#f46d43", "fcn8s": "#a50026"}
_HEAD = (
    "network",
    "Dice (95 % by patient)",
    "Dice of positives (95 %)",
    "SD of seeds",
    "IoU",
    "mean IU",
    "pixel accuracy",
    "image AUROC",
    "forward, ms",
    "parameters, M",
    "conv. layers",
    "receptive field, px",
    "max. stride",
)
# Long et al. 2015, arXiv 1411.4038: the table of classifiers, then, below the line, that of skips.
_PAPER_HEAD = (
    "network",
    "mean IU",
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
    "Dice and IoU are means over images, of which two empty masks count 1; {empty} is the Dice of finding nothing in "
    "any image. Mean IU and pixel accuracy are of all pixels together. Intervals are of other patients. {timed} "
    "Depth, receptive field and stride are of the path to the coarsest features; a U-Net's is its encoder.{cut}\n"
)
_OTHERS = (
    "Long et al. (2015) give, of 21 classes of objects in photographs (PASCAL VOC), with fully connected layers as "
    "convolutions:\n\n{table}\nOn SIIM-ACR itself a U-Net on a ResNet was given a Dice of .843 and an IoU of .826 "
    "(Jakhar et al. 2019), and the winner's ensemble had a Dice of .868 on the private test images.\n"
)


def table(judged: Sequence[Judged]) -> str:
    """Markdown: a row a network."""
    return markdown(_HEAD, [_cells(one) for one in judged])


def _cells(one: Judged) -> list[str]:
    figures, built = one.figures, one.built
    return [
        one.name,
        _sure(one.dice),
        _sure(one.positive_dice),
        number(one.spread),
        *(number(figures[name]) for name in ("iou", "mean_iu")),
        number(figures["pixel_accuracy"], 4),
        number(figures.get("image_auroc", float("nan"))),
        f"{one.forward_ms:.1f}",
        f"{built.parameters / 1e6:.1f}",
        f"{built.convolutions}",
        f"{built.receptive_field_px:,}",
        f"{built.stride_px}",
    ]


def _sure(mean: MeanInterval) -> str:
    return interval(mean.value, mean.low, mean.high)


def page(judged: Sequence[Judged], said: str, timed: str, *, cut: bool) -> str:
    """The table with what it means and what papers give, in Markdown.

    Args:
        said: of which images and seeds it is.
        timed: how the forward passes were timed.
        cut: whether AlexNet and VGG16 went without their fully connected layers.
    """
    empty = number(judged[0].figures["empty_dice"])
    without = " AlexNet and VGG16 are without their fully connected layers (fc6, fc7)." if cut else ""
    legend = _LEGEND.format(empty=empty, timed=timed, cut=without)
    return "\n".join([table(judged), f"{said}\n", legend, _OTHERS.format(table=markdown(_PAPER_HEAD, _PAPER))])


def csv(judged: Sequence[Judged]) -> str:
    """A row a network, all figures."""
    return csv_text([one.row() for one in judged])


def picture(judged: Sequence[Judged]) -> Figure:
    """Dice against forward time, all images and those with something to find; a dot's area goes with parameters."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, name in zip(panels, ("dice", "positive_dice"), strict=True):
        for one in judged:
            mean: MeanInterval = getattr(one, name)
            colour = _COLOURS.get(one.name.partition("-")[0], "0.5")
            axes.plot([one.forward_ms] * 2, [mean.low, mean.high], color=colour, lw=1, alpha=0.5)
            area = 6 + 5 * one.built.parameters / 1e6
            axes.scatter([one.forward_ms], [mean.value], s=area, color=colour, alpha=0.75, edgecolors="white")
            axes.annotate(one.name, (one.forward_ms, mean.value), (4, 3), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("forward pass of one image, ms")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(judged[0].figures["empty_dice"], color="0.4", ls="--", lw=1)
    panels[0].set_ylabel("mean Dice; dashed: of finding nothing")
    panels[1].set_ylabel("mean Dice of the images with something to find")
    shown = [name for name in _COLOURS if any(one.name.partition("-")[0] == name for one in judged)]
    dots = [Line2D([], [], marker="o", ls="", color=_COLOURS[name], label=name) for name in shown]
    panels[1].legend(handles=dots, fontsize=8, title="area: parameters", title_fontsize=8)
    return figure
