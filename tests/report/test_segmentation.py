"""Outlines lie where masks end, and tables say what was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet

from cxr.metrics.segmentation import MeanInterval
from cxr.report import segmentation
from cxr.report.segmentation import FOUND_COLOUR, TRUE_COLOUR, Overlay


def block(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((20, 30), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_outlines_lie_around_their_masks() -> None:
    shown = Overlay("first", np.zeros((20, 30)), block(4, 9, 10, 20), block(0, 20, 0, 5))
    figure = segmentation.overlay_figure({"worst": [shown], "best": []})
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "worst: first"
    drawn = [child for child in axes.get_children() if isinstance(child, ContourSet)]
    ends = {}
    for contour in drawn:
        points = np.concatenate([path.vertices for path in contour.get_paths()])
        ends[to_hex(np.asarray(contour.get_edgecolor())[0])] = (points.min(0), points.max(0))
    true, found = ends[TRUE_COLOUR], ends[FOUND_COLOUR]
    np.testing.assert_allclose(true, [[9.5, 3.5], [19.5, 8.5]])
    np.testing.assert_allclose(found, [[-0.5, -0.5], [4.5, 19.5]])
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 29.5), (19.5, -0.5))


def test_empty_masks_have_no_outline() -> None:
    nothing = block(0, 0, 0, 0)
    figure = segmentation.overlay_figure({"worst": [Overlay("", np.zeros((20, 30)), nothing, nothing)]})
    assert not [child for child in figure.axes[0].get_children() if isinstance(child, ContourSet)]
    with pytest.raises(ValueError, match="no image"):
        segmentation.overlay_figure({"worst": []})


def test_the_baseline_stands_below_the_dice() -> None:
    found = {"dice": 0.81, "empty_dice": 0.7785, "hd95_px": 12.34, "hd95_mm": math.nan, "images": 10}
    lines = segmentation.summary_table(found, {"dice": MeanInterval(0.81, 0.8, 0.82)}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [value for _, value in cells] == ["0.810 (0.800 to 0.820)", "0.778", "12.3", "–"]
    assert "finding nothing" in cells[1][0]


def test_a_submission_has_a_row_an_image() -> None:
    assert segmentation.siim_submission({"a": "3 2 5 1", "b": "-1"}) == "ImageId,EncodedPixels\na,3 2 5 1\nb,-1\n"
