"""The labels of a figure's horizontal axes, as they are drawn."""

from __future__ import annotations

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def least_gap_px(figure: Figure) -> float:
    """Between neighboring labels of any horizontal axis; negative if they overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    gaps = []
    for axes in figure.axes:
        left, right = axes.get_window_extent().intervalx
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in axes.get_xticklabels()]
        shown = sorted((box.x0, box.x1) for box in boxes if left <= (box.x0 + box.x1) / 2 <= right)
        gaps += [start - end for (_, end), (start, _) in itertools.pairwise(shown)]
    return min(gaps)
