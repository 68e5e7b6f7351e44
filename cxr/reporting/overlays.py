"""Images with what is true drawn over them, and what was found: masks by their outlines, boxes with words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from cxr.reporting.figures import TILE_INCHES
from cxr.reporting.page import Picture, save_picture
from cxr.reporting.palette import PREDICTION, TRUTH

_TILE = 1.6 * TILE_INCHES


@dataclass(frozen=True)
class MaskPair:
    """The true and the found one, (H, W) bool; None where the truth is not known."""

    true: np.ndarray | None
    found: np.ndarray

    def draw(self, ax: Axes) -> None:
        for mask, color in ((self.true, TRUTH), (self.found, PREDICTION)):
            if mask is not None and mask.any():
                padded = np.pad(mask.astype(np.float32), 1)  # outlines that meet the image's edge close there
                places = (np.arange(-1, length + 1) for length in mask.shape[::-1])
                ax.contour(*places, padded, levels=[0.5], colors=[color], linewidths=0.9)


@dataclass(frozen=True)
class BoxPair:
    """Boxes (K, 4) xyxy in the picture's pixels, and a word on each: above the true ones, below those found.

    `true` is None where the truth is not known.
    """

    true: np.ndarray | None
    true_words: Sequence[str]
    found: np.ndarray
    found_words: Sequence[str]

    def draw(self, ax: Axes) -> None:
        if self.true is not None:
            _draw_boxes(ax, self.true, self.true_words, TRUTH, above=True)
        _draw_boxes(ax, self.found, self.found_words, PREDICTION, above=False)


def _draw_boxes(ax: Axes, boxes_K4: np.ndarray, words: Sequence[str], color: str, *, above: bool) -> None:
    for (x0, y0, x1, y1), word in zip(boxes_K4.tolist(), words, strict=True):  # imshow's pixel centers at integers
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=color, lw=1))
        place, anchor = (y0 - 1, "bottom") if above else (y1 + 1, "top")
        ax.text(x0, place, word, color=color, fontsize=6, va=anchor)


@dataclass(frozen=True)
class Overlay:
    """An image to show: `picture` (H, W) in [0, 1], and what is drawn over it."""

    title: str
    picture: np.ndarray
    drawn: MaskPair | BoxPair


def overlay_figure(rows: Mapping[str, Sequence[Overlay]]) -> Figure:
    """One titled row a name, each image with what is true and what was found.

    Raises:
        ValueError: no image.
    """
    columns = max((len(row) for row in rows.values()), default=0)
    if not columns:
        raise ValueError("no image to show")
    figure = Figure(figsize=(_TILE * columns, _TILE * len(rows) * 1.12 + 0.3), layout="constrained")
    for axes_row, (name, shown) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for ax in axes_row:
            ax.set_axis_off()
        for ax, overlay in zip(axes_row, shown, strict=False):
            _show(ax, overlay)
            ax.set_title(f"{name}: {overlay.title}" if overlay.title else name, loc="left", fontsize=8)
    colors = {"true": TRUTH, "found": PREDICTION}
    if all(overlay.drawn.true is None for shown in rows.values() for overlay in shown):
        del colors["true"]
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def save_overlays(rows: Mapping[str, Sequence[Overlay]], folder: str, name: str, caption: str) -> list[Picture]:
    """Write `overlay_figure` as the PNG `name` into the URI `folder`; no picture where there is no image."""
    return [save_picture(overlay_figure(rows), folder, name, caption)] if any(rows.values()) else []


def _show(ax: Axes, overlay: Overlay) -> None:
    ax.imshow(overlay.picture, cmap="gray", vmin=0, vmax=1)
    overlay.drawn.draw(ax)
    height, width = overlay.picture.shape
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
