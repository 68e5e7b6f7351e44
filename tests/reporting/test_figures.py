"""Pictures of X-rays side by side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr.reporting import figures


def test_rows_show_each_picture_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {"given": rng.random((3, 8, 8)), "aligned": rng.random((3, 8, 8))}
    figure = figures.picture_rows(rows, ["a.png", "b.png", "1.2.3." * 12 + "c"])
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    np.testing.assert_array_equal(np.stack(shown), np.concatenate(list(rows.values())))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["given", "", "", "aligned", "", ""]
    captions = [ax.texts[0].get_text() for ax in figure.axes if ax.texts]
    assert captions[:2] == ["a.png", "b.png"]
    assert captions[2].startswith("…")
    assert captions[2].endswith("3.c")
    uri = figures.save_figure(figure, str(tmp_path / "new"), "rows.png")
    assert cv2.imread(uri) is not None


@pytest.mark.parametrize("lengths", [(2, 3), (0, 0)])
def test_rows_that_do_not_match_are_rejected(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="same number"):
        figures.picture_rows({str(i): np.zeros((n, 4, 4)) for i, n in enumerate(lengths)}, "abc")


def test_panels_leave_no_gaps() -> None:
    figure, axes = figures.panels(7, 2, 2, ("title", "x", "y"))
    assert figure.axes == axes
    assert len(axes) == 7
    with pytest.raises(ValueError, match="at least one"):
        figures.panels(0, 2, 2, ("title", "x", "y"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_titles_fit_in_their_figure(count: int) -> None:
    title = "Reliability; a calibrated model lies on the dashed line; dot areas are shares of the images"
    panels, _ = figures.panels(count, 2, 2, (title, "x", "y"))
    row = {"a title that is much longer than a single picture is wide": np.zeros((1, 8, 8))}
    rows = figures.picture_rows(row, ["a.png"], scale=("attention", np.zeros((8, 64, 3))))
    for figure in (panels, rows):
        figure.draw_without_rendering()
        shown = figure.get_tightbbox()
        assert shown.x0 >= 0
        assert shown.x1 <= figure.get_figwidth()


def test_gray_values_are_not_stretched(tmp_path: Path) -> None:
    picture = np.array([[0.25, 0.5], [0.5, 0.75]])
    uri = figures.save_gray(picture, str(tmp_path), "gray.png")
    read = cv2.imread(uri, cv2.IMREAD_GRAYSCALE)
    assert read is not None
    np.testing.assert_allclose(read / 255, picture, atol=0.01)
    assert len(figures.pictures({"a": picture, "b": picture}).axes) == 2
