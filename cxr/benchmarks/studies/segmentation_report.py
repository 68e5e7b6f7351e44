"""The table of segmentation networks with the figures of papers, and its picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from cxr.benchmarks.studies.segmentation import Judged
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
    "Dice and IoU are means over images, where two empty masks count as 1. Predicting only empty masks has a Dice of "
    "{empty}. Mean IoU and pixel accuracy are computed over all pixels together. Intervals come from resampling "
    "patients. {timed} Depth, receptive field and stride are those of the path to the coarsest features, which in a "
    "U-Net is the encoder.{cut}\n"
)
_OTHERS = (
    "Long et al. (2015) report these values for 21 classes of objects in photographs (PASCAL VOC), with fully "
    "connected layers as convolutions:\n\n{table}\nOn SIIM-ACR, a Dice of .843 and an IoU of .826 were reported for "
    "a U-Net on a ResNet (Jakhar et al. 2019), and the winner's ensemble had a Dice of .868 on the private test "
    "images.\n"
)


def table(judged: Sequence[Judged]) -> str:
    """Markdown: one row per network."""
    return markdown(_HEAD, [_cells(one) for one in judged])


def _cells(one: Judged) -> list[str]:
    figures, built = one.figures, one.built
    return [
        one.name,
        _sure(one.dice),
        _sure(one.positive_dice),
        number(one.spread),
        *(number(figures[name]) for name in ("iou", "mean_iou")),
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
    """The table with its legend and the figures of papers, in Markdown.

    Args:
        said: which images and seeds were used.
        timed: how the forward passes were timed.
        cut: whether AlexNet and VGG16 went without their fully connected layers.
    """
    empty = number(judged[0].figures["empty_prediction_dice"])
    without = " AlexNet and VGG16 are used without their fully connected layers (fc6, fc7)." if cut else ""
    legend = _LEGEND.format(empty=empty, timed=timed, cut=without)
    return "\n".join([table(judged), f"{said}\n", legend, _OTHERS.format(table=markdown(_PAPER_HEAD, _PAPER))])


def csv(judged: Sequence[Judged]) -> str:
    """One row per network with all figures."""
    return csv_text([one.row() for one in judged])


def picture(judged: Sequence[Judged]) -> Figure:
    """One row per network, the best first: Dice of all images, of those with something to find, forward time."""
    order = sorted(judged, key=lambda one: one.positive_dice.value)
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(order)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    colors = [_COLORS.get(one.name.partition("-")[0], palette.NEUTRAL) for one in order]
    for axes, name in zip(panels, ("dice", "positive_dice"), strict=False):
        for row, (one, color) in enumerate(zip(order, colors, strict=True)):
            mean: MeanInterval = getattr(one, name)
            axes.plot([mean.low, mean.high], [row] * 2, color=color, lw=2, alpha=0.4)
            axes.plot([mean.value], [row], "o", color=color, ms=6)
    panels[2].barh(range(len(order)), [one.forward_ms for one in order], height=0.5, color=colors)
    panels[2].bar_label(panels[2].containers[0], fmt=" {:.0f}", fontsize=8)
    panels[0].set_yticks(range(len(order)), [one.name for one in order], fontsize=8)
    panels[0].axvline(judged[0].figures["empty_prediction_dice"], color=palette.NEUTRAL, ls="--", lw=1)
    panels[0].set_ylim(-0.6, len(order) - 0.4)
    titles = (
        "mean Dice (95 %); dashed: only empty masks",
        "of images with a true mask (95 %)",
        "forward, ms",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="x", color=palette.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
