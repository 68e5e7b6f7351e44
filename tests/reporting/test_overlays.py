"""Outlines lie where masks end, boxes where they should, with their words."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.patches import Rectangle

from cxr.reporting.overlays import TILE_PX, BoxPair, MaskPair, Overlay, label_places, overlay_figure, without_repeats
from cxr.reporting.palette import PREDICTION, TRUTH


def block(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((20, 30), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_outlines_lie_around_their_masks() -> None:
    shown = Overlay("a.png", "first", np.zeros((20, 30)), MaskPair(block(4, 9, 10, 20), block(0, 20, 0, 5)))
    figure = overlay_figure({"worst": [shown], "best": []})
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "a.png\nworst: first"
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
    figure = overlay_figure({"worst": [Overlay("a.png", "", np.zeros((20, 30)), MaskPair(nothing, nothing))]})
    assert not [child for child in figure.axes[0].get_children() if isinstance(child, ContourSet)]
    with pytest.raises(ValueError, match="at least one image"):
        overlay_figure({"worst": []})


def test_boxes_lie_on_pixel_edges_with_their_words() -> None:
    pair = BoxPair(np.array([[2.0, 3, 12, 9]]), ["Mass"], np.array([[0.0, 0, 30, 20]]), ["Mass 0.50"])
    axes = overlay_figure({"best": [Overlay("a.png", "", np.zeros((20, 30)), pair)]}).axes[0]
    drawn = {
        to_hex(box.get_edgecolor()): box.get_bbox().extents for box in axes.patches if isinstance(box, Rectangle)
    }
    np.testing.assert_allclose(drawn[TRUTH], [1.5, 2.5, 11.5, 8.5])
    np.testing.assert_allclose(drawn[PREDICTION], [-0.5, -0.5, 29.5, 19.5])
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        "Mass": TRUTH,
        "Mass 0.50": PREDICTION,
    }


def test_labels_lie_inside_the_picture_and_not_on_one_another() -> None:
    """Labels as drawn, with the true widths of their letters."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.7, (12, 2)) * TILE_PX
    boxes = np.hstack([low, low + rng.uniform(20, 140, (12, 2))])
    labels = [f"Pleural effusion {number / 100:.2f}" for number in range(12)]
    boxes[1:3] = boxes[0]  # three on the same place
    pair = BoxPair(boxes[:6], labels[:6], boxes[6:], labels[6:])
    figure = overlay_figure({"best": [Overlay("a.png", "", np.zeros((TILE_PX, TILE_PX)), pair)]})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    drawn = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(drawn, 2))
    around = axes.get_window_extent().padded(2)
    assert all(around.containsx(x) and around.containsy(y) for box in drawn for x, y in (box.min, box.max))


def test_a_picture_without_room_still_has_every_label() -> None:
    boxes = [[0.0, 0, 10, 10]] * 200
    places = label_places(boxes, ["Mass"] * 200, (64, 64))
    assert len(places) == 200


def test_every_image_has_its_own_pixels_and_its_id() -> None:
    shown = [
        Overlay(f"{'1.2.3.' * 12}{n}", "", np.zeros((64, 64)), MaskPair(None, np.ones((64, 64), bool))) for n in "ab"
    ]
    figure = overlay_figure({"largest": shown, "middle": [], "smallest": shown[:1]})
    figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.rpartition(".")[2] for title in titles] == ["a\nlargest", "b\nlargest", "a\nsmallest"]
    assert titles[0][0] == "…"
    extents = [axes.get_window_extent() for axes in figure.axes]
    np.testing.assert_allclose([(extent.width, extent.height) for extent in extents], TILE_PX)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["prediction"]


def test_no_image_is_shown_twice() -> None:
    order = np.arange(5)
    shown = without_repeats({"worst": order, "best": order[::-1], "random": order}, 3)
    assert shown == {"worst": [0, 1, 2], "best": [4, 3], "random": []}
