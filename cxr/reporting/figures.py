"""Figures of X-rays and of panels side by side; drawn with matplotlib's objects, without pyplot's global state.

Families import this module for the pictures of their checkpoints. Matplotlib is imported with the first figure, so
that training and scoring do not need it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cxr import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
TILE_INCHES = 1.6
_COLUMNS = 5  # of panels
_LETTERS_PER_INCH = 12  # of a figure's title
_CAPTION_LETTERS = 26  # an image id is cut to its end beyond these


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, which arranges its axes itself."""
    figure = _plain_figure(width, height)
    figure.set_layout_engine("constrained")
    return figure


def _plain_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def picture_rows(
    rows: Mapping[str, np.ndarray],
    image_ids: Sequence[str],
    *,
    notes: Sequence[str] = (),
    colors: Mapping[str, str] | None = None,
    scale: tuple[str, np.ndarray] | None = None,
) -> Figure:
    """One titled row for each name, (N, H, W) or (N, H, W, 3) in [0, 1]; a column shows the same image in each.

    Args:
        image_ids: the ids of the N images, which are written below their columns.
        notes: a line about each image, below its id.
        colors: what the colors of outlines mean, for a legend.
        scale: for the legend of a heat map: its name, and a strip (h, w, 3) in [0, 1] of its colors from 0 to 1.

    Raises:
        ValueError: no pictures, or rows of different lengths.
    """
    from matplotlib.lines import Line2D

    lengths = {len(pictures) for pictures in rows.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected rows with the same number of pictures, at least one; got {sorted(lengths)}")
    columns = lengths.pop()
    captions = [cut_id(image_id, _CAPTION_LETTERS) for image_id in image_ids]
    if notes:
        captions = [f"{caption}\n{note}" for caption, note in zip(captions, notes, strict=True)]
    tile, gap, head, legend = TILE_INCHES, 0.08, 0.24, 0.3 if colors or scale else 0.0  # inches
    foot = 0.34 if notes else 0.22
    least = max(map(len, rows)) / _LETTERS_PER_INCH + 2 * gap  # a single picture leaves room for the titles
    width = max(gap + columns * (tile + gap), least, 4.0 if scale else 0.0)
    height = legend + len(rows) * (head + tile) + foot
    figure = _plain_figure(width, height)
    for row, (name, pictures) in enumerate(rows.items()):
        bottom = height - legend - (row + 1) * (head + tile)
        for column, picture in enumerate(pictures):
            left = gap + column * (tile + gap)
            ax = figure.add_axes((left / width, bottom / height, tile / width, tile / height))
            _show(ax, picture)
            ax.set_title(name if column == 0 else "", loc="left", fontsize=9, pad=4)
            if row == len(rows) - 1:
                ax.text(0, -0.02, captions[column], transform=ax.transAxes, va="top", fontsize=6.5)
    if colors:
        handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in colors.items()]
        figure.legend(handles=handles, loc="upper left", ncols=2, borderaxespad=0.2, fontsize=9, frameon=False)
    if scale:
        name, strip = scale
        place = ((width - gap - 1.1) / width, (height - 0.22) / height, 0.95 / width, 0.12 / height)
        ax = figure.add_axes(place, label="scale")
        ax.imshow(strip, aspect="auto")
        ax.set_axis_off()
        ax.text(-0.04, 0.5, f"{name}: 0", transform=ax.transAxes, ha="right", va="center", fontsize=9)
        ax.text(1.04, 0.5, "1", transform=ax.transAxes, ha="left", va="center", fontsize=9)
    return figure


def cut_id(image_id: str, letters: int) -> str:
    """The end of an image id that is longer than this, after an ellipsis."""
    return image_id if len(image_id) <= letters else f"…{image_id[1 - letters :]}"


def pictures(named: Mapping[str, np.ndarray]) -> Figure:
    """Titled pictures (H, W) in [0, 1] side by side."""
    figure = new_figure(2 * TILE_INCHES * len(named), 2 * TILE_INCHES + 0.2)
    for ax, (name, picture) in zip(figure.subplots(1, len(named), squeeze=False)[0], named.items(), strict=True):
        _show(ax, picture)
        ax.set_title(name, fontsize=10)
    return figure


def panels(count: int, width: float, height: float, labels: tuple[str, str, str]) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes from 0 to 1 in x, in rows of five, without empty axes in the last row.

    Args:
        width: of a panel, inches; likewise `height`.
        labels: title of the figure, and what its x and y axes show.

    Raises:
        ValueError: no panel.
    """
    if not count:
        raise ValueError("expected at least one panel, got none")
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    title, x_label, y_label = labels
    figure = new_figure(max(3.6, width * columns) + 0.6, height * rows + 0.8)
    grid = figure.add_gridspec(rows, columns)
    axes = [figure.add_subplot(grid[divmod(number, columns)]) for number in range(count)]
    for ax in axes:
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    letters = int(_LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, letters), fontsize=10)
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    return figure, axes


def save_figure(figure: Figure, folder: str, name: str) -> str:
    """Write `figure` as the PNG `name` into the URI `folder`; returns its URI."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png")
    return _write(png, folder, name)


def save_pixels(pixels_HW3: np.ndarray, folder: str, name: str) -> str:
    """Write a color picture, uint8, as the PNG `name`, pixel by pixel; returns its URI."""
    from matplotlib.image import imsave

    png = io.BytesIO()
    imsave(png, pixels_HW3, format="png")
    return _write(png, folder, name)


def save_gray(picture: np.ndarray, folder: str, name: str) -> str:
    """Write a picture (H, W) in [0, 1] as the PNG `name`, pixel by pixel; returns its URI."""
    from matplotlib.image import imsave

    png = io.BytesIO()
    imsave(png, picture, cmap="gray", vmin=0, vmax=1, format="png")
    return _write(png, folder, name)


def _write(png: io.BytesIO, folder: str, name: str) -> str:
    uri = storage.join(storage.normalize(folder), name)
    storage.write_bytes(uri, png.getvalue())
    return uri


def _show(ax: Axes, picture: np.ndarray) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()
