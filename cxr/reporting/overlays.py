"""Images with the truth and the prediction drawn over them: masks as outlines, boxes with their findings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from cxr.reporting.figures import DPI, cut_id, save_pixels
from cxr.reporting.page import Gallery, Picture
from cxr.reporting.palette import PREDICTION, TRUTH

TILE_PX = 512  # width and height of each image in the figure; evaluation reads images of at least that size
_WIDTHS = {TRUTH: 2.6, PREDICTION: 1.2}  # points; where both coincide, the truth shows at both sides
_LABEL_POINTS = 8.0
_LETTER = 0.62, 1.45  # width and height of a letter with its margin, in font sizes
_ID_LETTERS = 56  # an image id is cut to its end beyond these
_MESSAGE_LETTERS = 40  # of a line

Rectangle4 = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max


@dataclass(frozen=True)
class MaskPair:
    """True and predicted mask, (H, W) bool; `truth` is None where it is not known."""

    truth: np.ndarray | None
    prediction: np.ndarray

    def draw(self, ax: Axes) -> None:
        for mask, color in ((self.truth, TRUTH), (self.prediction, PREDICTION)):
            if mask is not None and mask.any():
                padded = np.pad(mask.astype(np.float32), 1)  # closes outlines that meet the image's edge
                places = (np.arange(-1, length + 1) for length in mask.shape[::-1])
                ax.contour(*places, padded, levels=[0.5], colors=[color], linewidths=_WIDTHS[color])


@dataclass(frozen=True)
class BoxPair:
    """True and predicted boxes (K, 4) xyxy in the picture's pixels, with a label each, which may be empty.

    `truth` is None where it is not known.
    """

    truth: np.ndarray | None
    truth_labels: Sequence[str]
    prediction: np.ndarray
    prediction_labels: Sequence[str]

    def draw(self, ax: Axes) -> None:
        truth = np.zeros((0, 4)) if self.truth is None else self.truth
        boxes = [*truth.tolist(), *self.prediction.tolist()]
        labels, colors = [*self.truth_labels, *self.prediction_labels], [TRUTH] * len(truth)
        colors += [PREDICTION] * (len(boxes) - len(truth))
        for (x0, y0, x1, y1), color in zip(boxes, colors, strict=True):  # imshow's pixel centers lie at integers
            ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=color, lw=_WIDTHS[color]))
        size = ax.get_xlim()[1] + 0.5, ax.get_ylim()[0] + 0.5
        for (x, y), label, color in zip(label_places(boxes, labels, size), labels, colors, strict=True):
            ax.text(
                x,
                y,
                label,
                color=color,
                fontsize=_LABEL_POINTS,
                va="top",
                clip_on=True,
                bbox={"facecolor": "black", "alpha": 0.75, "linewidth": 0, "pad": 1},
            )


@dataclass(frozen=True)
class Message:
    """A few words in the middle of the picture, such as why there is none."""

    text: str

    def draw(self, ax: Axes) -> None:
        words = textwrap.fill(self.text, _MESSAGE_LETTERS)
        ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color="white", fontsize=10)


def label_places(
    boxes: Sequence[Sequence[float]], labels: Sequence[str], size: tuple[float, float], tile_px: int = TILE_PX
) -> list[tuple[float, float]]:
    """`free_places` for labels of a figure.

    Args:
        size: width and height of the picture, in the pixels of `boxes`; it is shown `tile_px` high.
    """
    return free_places(boxes, labels, size, _LABEL_POINTS / 72 * DPI * max(size) / tile_px)


def free_places(
    boxes: Sequence[Sequence[float]], labels: Sequence[str], size: tuple[float, float], letter: float
) -> list[tuple[float, float]]:
    """The upper left corner of each box's label, inside the image and, where there is room, not on another label.

    A label is above its box if there is room, otherwise below it, otherwise in the nearest free row.

    Args:
        size: width and height of the picture, in the pixels of `boxes`.
        letter: size of the font, in the same pixels.
    """
    placed: list[Rectangle4] = []
    for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        width, height = (
            _LETTER[0] * letter * (len(label) + 1),
            _LETTER[1] * letter,
        )  # labels side by side do not touch
        rows = sorted(np.arange(0, max(height, size[1] - height), height).tolist(), key=lambda y: abs(y - y0))
        places = [
            (min(max(0, x), max(0, size[0] - width)), y)
            for y in (y0 - height, y1, *rows)
            if 0 <= y <= max(0, size[1] - height)
            for x in (x0, x1 - width)
        ]
        tried = [(x, y, x + width, y + height) for x, y in places]
        free = (place for place in tried if not label or not any(_overlap(place, other) for other in placed))
        placed.append(next(free, tried[0]))
    return [(x, y) for x, y, _, _ in placed]


def _overlap(a: Rectangle4, b: Rectangle4) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Overlay:
    """An image to show.

    Args:
        note: text after the image's id, such as a score.
        picture: (H, W) in [0, 1], or (H, W, 3) uint8 in red, green, blue.
        pair: what to draw over the image: truth and prediction, or a message.
    """

    image_id: str
    note: str
    picture: np.ndarray
    pair: MaskPair | BoxPair | Message | None = None


def without_repeats(ranked: Mapping[str, Iterable[int]], count: int) -> dict[str, list[int]]:
    """The first `count` of each name that no earlier name has, so that a figure shows every image once."""
    shown: dict[str, list[int]] = {}
    for name, items in ranked.items():
        earlier = {item for others in shown.values() for item in others}
        shown[name] = [int(item) for item in items if int(item) not in earlier][:count]
    return shown


def overlay_figure(rows: Mapping[str, Sequence[Overlay]]) -> Figure:
    """One row for each name that has images; every image with its id, and a legend.

    Raises:
        ValueError: no image.
    """
    filled = {name: shown for name, shown in rows.items() if shown}
    if not filled:
        raise ValueError("expected at least one image to show, got none")
    tile, gap, head, legend = TILE_PX / DPI, 0.1, 0.45, 0.35  # inches
    width = gap + max(map(len, filled.values())) * (tile + gap)
    height = legend + len(filled) * (head + tile) + gap
    figure = Figure(figsize=(width, height), dpi=DPI)
    for row, (name, shown) in enumerate(filled.items()):
        bottom = height - legend - (row + 1) * (head + tile)
        for column, overlay in enumerate(shown):
            left = gap + column * (tile + gap)
            _show(figure.add_axes((left / width, bottom / height, tile / width, tile / height)), overlay, name)
    if handles := _legend(filled):
        figure.legend(handles=handles, loc="upper left", ncols=2, borderaxespad=0.2, fontsize=10, frameon=False)
    return figure


def save_overlays(rows: Mapping[str, Sequence[Overlay]], folder: str, name: str, caption: str) -> list[Gallery]:
    """Write `overlay_figure` as the PNG `name` into the URI `folder`, and each of its images as a PNG of its own.

    Returns:
        One gallery; none if there is no image.
    """
    if not any(rows.values()):
        return []
    figure = overlay_figure(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    sheet = Picture(save_pixels(pixels, folder, name), caption)
    stem, axes, groups = name.removesuffix(".png"), iter(figure.axes), {}
    for group, shown in rows.items():
        groups[group] = []
        for number, overlay in enumerate(shown, 1):
            (x0, y0), (x1, y1) = np.rint(next(axes).get_window_extent().get_points()).astype(int)
            uri = save_pixels(
                pixels[len(pixels) - y1 : len(pixels) - y0, x0:x1],
                folder,
                f"{stem}_{group}_{number}.png".replace(" ", "_"),
            )
            note = f": {overlay.note}" if overlay.note else ""
            groups[group].append(
                Picture(uri, f"{overlay.image_id}{note}", f"X-ray {overlay.image_id}, {group}{note}")
            )
    colors = {str(handle.get_label()): to_hex(handle.get_color()) for handle in _legend(rows)}
    return [Gallery(groups, sheet, colors)]


def _legend(rows: Mapping[str, Sequence[Overlay]]) -> list[Line2D]:
    """What the colors of masks and boxes mean; only those that occur."""
    drawn = (overlay.pair for shown in rows.values() for overlay in shown)
    pairs = [pair for pair in drawn if isinstance(pair, (MaskPair, BoxPair))]
    known = any(pair.truth is not None for pair in pairs)
    colors = ({"ground truth": TRUTH} if known else {}) | ({"prediction": PREDICTION} if pairs else {})
    return [Line2D([], [], color=color, lw=2, label=name) for name, color in colors.items()]


def _show(ax: Axes, overlay: Overlay, name: str) -> None:
    ax.set_axis_off()
    ax.imshow(overlay.picture, cmap="gray", vmin=0, vmax=1)
    height, width = overlay.picture.shape[:2]
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if overlay.pair is not None:
        overlay.pair.draw(ax)
    image_id = cut_id(overlay.image_id, _ID_LETTERS)
    ax.set_title(f"{image_id}\n{name}{f': {overlay.note}' if overlay.note else ''}", loc="left", fontsize=9)
