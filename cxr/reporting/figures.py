"""Figures of X-rays and of panels side by side; drawn with matplotlib's objects, without pyplot's global state.

Families import this module for the pictures of their checkpoints. Matplotlib is imported with the first figure, so
that training and scoring do not need it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cxr import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
TILE_INCHES = 1.6
_COLUMNS = 5  # of panels


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def picture_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """One titled row for each name, (N, H, W) or (N, H, W, 3) in [0, 1]; a column shows the same image in each.

    Raises:
        ValueError: no pictures, or rows of different lengths.
    """
    lengths = {len(pictures) for pictures in rows.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected rows with the same number of pictures, at least one; got {sorted(lengths)}")
    columns = lengths.pop()
    figure = new_figure(TILE_INCHES * columns, TILE_INCHES * len(rows) * 1.08)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(axes_row, pictures, strict=True):
            _show(ax, picture)
        axes_row[0].set_title(name, loc="left", fontsize=9)
    return figure


def pictures(named: Mapping[str, np.ndarray]) -> Figure:
    """Titled pictures (H, W) in [0, 1] side by side."""
    figure = new_figure(2 * TILE_INCHES * len(named), 2.2 * TILE_INCHES)
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
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    return figure, axes


def save_figure(figure: Figure, folder: str, name: str) -> str:
    """Write `figure` as the PNG `name` into the URI `folder`; returns its URI."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png")
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
