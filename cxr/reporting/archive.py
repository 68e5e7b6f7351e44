"""Pictures of an archive that was inspected: a contact sheet, labels by split, boxes, views and ages."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cxr.reporting.figures import DPI, new_figure
from cxr.reporting.palette import FRAME, GRID, NEUTRAL, SERIES, TRUTH, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLUMNS, TILE_PX = 4, 384  # of the contact sheet
MASK_COLORS = (SERIES[1], SERIES[2], SERIES[7], SERIES[9], SERIES[3])  # visible on an X-ray beside TRUTH
_LINE_LETTERS, _TITLE_LINES = 56, 3
_MOST_FINDINGS = 40  # in a figure
_MOST_CENTERS = 400  # of boxes of a finding that are shown


@dataclass(frozen=True)
class Tile:
    """An image on the contact sheet.

    Args:
        picture: (H, W) in [0, 1].
        facts: what is known about it, such as its split and its labels; one line each.
        boxes: (K, 4) xyxy in pixels of the picture.
        masks: bool (H, W) by label.
    """

    image_id: str
    picture: np.ndarray
    facts: Sequence[str] = ()
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    box_labels: Sequence[str] = ()
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)


def contact_sheet(tiles: Sequence[Tile]) -> Figure:
    """All tiles with their boxes and the outlines of their masks, and a legend of the masks.

    Raises:
        ValueError: no tile.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not tiles:
        raise ValueError("expected at least one image, got none")
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    tile, gap, head, legend = TILE_PX / DPI, 0.1, 0.62, 0.35  # inches
    width, height = gap + columns * (tile + gap), legend + rows * (head + tile) + gap
    figure = Figure(figsize=(width, height), dpi=DPI)
    labels = list(dict.fromkeys(label for tile_ in tiles for label in tile_.masks))
    colors = {label: MASK_COLORS[number % len(MASK_COLORS)] for number, label in enumerate(labels)}
    for number, shown in enumerate(tiles):
        row, column = divmod(number, columns)
        left, bottom = gap + column * (tile + gap), height - legend - (row + 1) * (head + tile)
        _draw(figure.add_axes((left / width, bottom / height, tile / width, tile / height)), shown, colors)
    handles = [Line2D([], [], color=color, lw=2, label=f"mask: {label}") for label, color in colors.items()]
    if any(len(shown.boxes) for shown in tiles):
        handles.insert(0, Line2D([], [], color=TRUTH, lw=2, label="box of a finding"))
    if handles:
        figure.legend(handles=handles, loc="upper left", ncols=6, borderaxespad=0.2, fontsize=9, frameon=False)
    return figure


def _draw(ax: Axes, tile: Tile, colors: Mapping[str, str]) -> None:
    from matplotlib.patches import Rectangle

    from cxr.reporting.overlays import label_places

    ax.set_axis_off()
    ax.imshow(tile.picture, cmap="gray", vmin=0, vmax=1)
    height, width = tile.picture.shape
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for label, mask in tile.masks.items():
        if mask.any():
            padded = np.pad(mask.astype(np.float32), 1)  # closes outlines that meet the edge of the image
            places = (np.arange(-1, length + 1) for length in mask.shape[::-1])
            ax.contour(*places, padded, levels=[0.5], colors=[colors[label]], linewidths=1.4)
    for x0, y0, x1, y1 in tile.boxes.tolist():  # imshow's pixel centers are at integers
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=TRUTH, lw=1.6))
    size = float(width), float(height)
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1}
    for (x, y), label in zip(
        label_places(tile.boxes.tolist(), tile.box_labels, size, TILE_PX), tile.box_labels, strict=True
    ):
        ax.text(x, y, label, color="white", fontsize=8, va="top", clip_on=True, bbox=box)
    image_id = tile.image_id
    lines = [image_id if len(image_id) <= _LINE_LETTERS else f"…{image_id[1 - _LINE_LETTERS :]}", *tile.facts]
    shown = [textwrap.shorten(line, _LINE_LETTERS, placeholder=" …") for line in lines[:_TITLE_LINES]]
    shown += [""] * (_TITLE_LINES - len(shown))
    ax.set_title("\n".join(shown), loc="left", fontsize=7.5, pad=3)


def labels_by_split(positives: Mapping[str, Mapping[str, int]], known: Mapping[str, int]) -> Figure:
    """Images with each finding, by split.

    Args:
        positives: positive images by split, by finding.
        known: images in which the finding is known, by finding.
    """
    shown = dict(list(positives.items())[:_MOST_FINDINGS])
    splits = list(dict.fromkeys(split for of_split in shown.values() for split in of_split))
    figure = new_figure(8, 1.2 + 0.27 * len(shown))
    ax = figure.subplots()
    places, left = np.arange(len(shown)), np.zeros(len(shown))
    for number, split in enumerate(splits):
        counts = np.array([of_split.get(split, 0) for of_split in shown.values()], float)
        ax.barh(places, counts, left=left, color=series(number), label=split, height=0.7)
        left += counts
    for place, (finding, total) in enumerate(zip(shown, left.astype(int).tolist(), strict=True)):
        share = f" ({total / known[finding]:.1%})" if known[finding] else ""
        ax.text(total, place, f" {total:,}{share}", va="center", fontsize=8, color=NEUTRAL)
    ax.set_yticks(places, list(shown), fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(1, left.max(initial=1)))
    _whole_numbers(ax.xaxis)
    ax.set_xlabel("positive images (share of the images in which the finding is known)")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(splits), fontsize=8, frameon=False)
    _plain(ax)
    return figure


def box_places(boxes: Mapping[str, np.ndarray]) -> Figure:
    """The areas and centers of boxes (K, 4) in shares of the image, xyxy, by finding."""
    from matplotlib.ticker import LogLocator, NullLocator

    shown = dict(sorted(boxes.items(), key=lambda item: -len(item[1]))[:_MOST_FINDINGS])
    figure = new_figure(11, max(4.4, 1.2 + 0.3 * len(shown)))
    areas_ax, centers_ax = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for place, (finding, of_finding) in enumerate(shown.items()):
        area = 100 * np.prod(of_finding[:, 2:] - of_finding[:, :2], 1)
        low, first, median, third, high = np.percentile(area, (5, 25, 50, 75, 95))
        color = series(place)
        areas_ax.plot((low, high), (place, place), color=color, lw=1.2, solid_capstyle="butt")
        areas_ax.plot((first, third), (place, place), color=color, lw=6, solid_capstyle="butt")
        areas_ax.plot(median, place, "o", color="white", mec=color, ms=6)
        center = (of_finding[:, :2] + of_finding[:, 2:]) / 2
        chosen = center[:: max(1, len(center) // _MOST_CENTERS)]
        size = np.clip(9 - 0.25 * np.sqrt(len(chosen)), 4, 9)  # few points are large enough to be seen
        centers_ax.plot(*chosen.T, "o", color=color, ms=size, alpha=0.6, mew=0, label=finding)
    areas_ax.set_yticks(range(len(shown)), [f"{name} ({len(each):,})" for name, each in shown.items()], fontsize=9)
    areas_ax.invert_yaxis()
    areas_ax.set_xscale("log")
    areas_ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    areas_ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    areas_ax.xaxis.set_minor_locator(NullLocator())
    areas_ax.set_xlabel("area of a box, % of the image (5 to 95 %, quartiles, median)")
    _plain(areas_ax)
    centers_ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    centers_ax.set_xlabel("centers of boxes in the image", fontsize=10)
    if len(shown) <= len(SERIES):
        centers_ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for spine in centers_ax.spines.values():
        spine.set_color(FRAME)
    return figure


def counts_and_ages(counts: Mapping[str, Mapping[str, int]], ages: Mapping[str, np.ndarray]) -> Figure:
    """A bar chart of each of `counts`, such as views, and a histogram of ages in years by sex, if there are any."""
    filled = {name: of_name for name, of_name in counts.items() if of_name}
    ages = {sex: years for sex, years in ages.items() if len(years)}
    panels = len(filled) + bool(ages)
    if not panels:
        raise ValueError("expected counts or ages, got none")
    figure = new_figure(min(12, 1 + 3.4 * panels), 3.2)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax, (name, of_name) in zip(axes, filled.items(), strict=False):
        values = dict(sorted(of_name.items(), key=lambda item: -item[1])[:10])
        ax.barh(list(values), list(values.values()), color=SERIES[0], height=0.7)
        for place, count in enumerate(values.values()):
            ax.text(count, place, f" {count:,}", va="center", fontsize=8, color=NEUTRAL)
        ax.set_xlim(0, 1.25 * max(values.values()))
        ax.set_ylim(max(4, len(values)) - 0.4, -0.6)  # a few bars are not thicker than many
        ax.set_title(name, fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        _whole_numbers(ax.xaxis)
        _plain(ax)
    if ages:
        bins = np.arange(0, 105, 5)
        for number, (sex, years) in enumerate(ages.items()):
            axes[-1].hist(years, bins, histtype="stepfilled", alpha=0.45, color=series(number), label=sex)
            axes[-1].hist(years, bins, histtype="step", color=series(number))
        _whole_numbers(axes[-1].yaxis)
        axes[-1].set_ylabel("images", fontsize=8)
        axes[-1].set_title("age in years", fontsize=10, loc="left")
        axes[-1].legend(fontsize=8, frameon=False)
        axes[-1].tick_params(labelsize=8)
        axes[-1].spines[["top", "right"]].set_visible(False)
    return figure


def _whole_numbers(axis: Axis) -> None:
    """Ticks for counts: there are no half images."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=GRID)
    ax.set_axisbelow(True)
