"""Figures of X-rays side by side; drawn with matplotlib's objects, without pyplot's global state.

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

TILE_INCHES = 1.6


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def picture_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """One titled row a name, each (N, H, W) in [0, 1]; the same column shows the same image.

    Raises:
        ValueError: no pictures, or rows of different lengths.
    """
    lengths = {len(pictures) for pictures in rows.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"rows of {sorted(lengths)} pictures: wanted the same number, at least one, in each")
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


def save_figure(figure: Figure, folder: str, name: str) -> str:
    """Write `figure` as the PNG `name` into the URI `folder`; returns its URI."""
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
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
