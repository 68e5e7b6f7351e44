"""Colors have one meaning, and are named in one place."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import cxr
from cxr.reporting import palette

WHITE, XRAY = (255, 255, 255), (60, 60, 60)


def luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance as in WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("color", [palette.TRUTH, palette.PREDICTION])
def test_truth_and_prediction_are_readable_on_white_and_over_an_xray(color: str) -> None:
    assert contrast(palette.rgb(color), WHITE) > 2.4
    assert contrast(palette.rgb(color), XRAY) > 3


def test_colors_of_a_series_differ() -> None:
    distances = [
        np.abs(np.subtract(palette.rgb(a), palette.rgb(b))).sum() for a, b in combinations(palette.SERIES, 2)
    ]
    assert min(distances) > 60


def test_opencv_gets_blue_first() -> None:
    assert palette.rgb("#010203") == (1, 2, 3)


def test_no_other_module_names_a_color() -> None:
    """The style sheet of the page is no module."""
    root = Path(cxr.__file__).parent
    named = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if re.search("#[0-9a-f]{6}\\b", path.read_text())
    }
    assert named == {"reporting/palette.py"}
