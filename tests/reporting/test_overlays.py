"""Outlines lie where masks end, boxes where they should, with their words."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.patches import Rectangle

from cxr.reporting.overlays import BoxPair, MaskPair, Overlay, overlay_figure
from cxr.reporting.palette import PREDICTION, TRUTH


def block(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((20, 30), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_outlines_lie_around_their_masks() -> None:
    shown = Overlay("first", np.zeros((20, 30)), MaskPair(block(4, 9, 10, 20), block(0, 20, 0, 5)))
    figure = overlay_figure({"worst": [shown], "best": []})
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "worst: first"
    drawn = [child for child in axes.get_children() if isinstance(child, ContourSet)]
    ends = {}
    for contour in drawn:
        points = np.concatenate([path.vertices for path in contour.get_paths()])
        ends[to_hex(np.asarray(contour.get_edgecolor())[0])] = (points.min(0), points.max(0))
    true, found = ends[TRUTH], ends[PREDICTION]
    np.testing.assert_allclose(true, [[9.5, 3.5], [19.5, 8.5]])
    np.testing.assert_allclose(found, [[-0.5, -0.5], [4.5, 19.5]])
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 29.5), (19.5, -0.5))


def test_empty_masks_have_no_outline() -> None:
    nothing = block(0, 0, 0, 0)
    figure = overlay_figure({"worst": [Overlay("", np.zeros((20, 30)), MaskPair(nothing, nothing))]})
    assert not [child for child in figure.axes[0].get_children() if isinstance(child, ContourSet)]
    with pytest.raises(ValueError, match="no image"):
        overlay_figure({"worst": []})


def test_boxes_lie_on_pixel_edges_with_their_words() -> None:
    pair = BoxPair(np.array([[2.0, 3, 12, 9]]), ["Mass"], np.array([[0.0, 0, 30, 20]]), ["Mass 0.50"])
    axes = overlay_figure({"best": [Overlay("", np.zeros((20, 30)), pair)]}).axes[0]
    drawn = {
        to_hex(box.get_edgecolor()): box.get_bbox().extents for box in axes.patches if isinstance(box, Rectangle)
    }
    np.testing.assert_allclose(drawn[TRUTH], [1.5, 2.5, 11.5, 8.5])
    np.testing.assert_allclose(drawn[PREDICTION], [-0.5, -0.5, 29.5, 19.5])
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        "Mass": TRUTH,
        "Mass 0.50": PREDICTION,
    }
