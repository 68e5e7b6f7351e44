"""The colors of all pictures and figures: one meaning, one color. Does not import matplotlib."""

from __future__ import annotations

TRUTH, PREDICTION = "#12a5dc", "#f58216"  # readable over an X-ray as well as on white, and for the color-blind
MODEL, MODEL_PALE = "#1b6ca8", "#d5e5f1"  # one model's curve or points, and the area under it
MARK = "#c0392b"  # for what should stand out: a mean, a decision threshold, a target
NEUTRAL, FRAME, GRID = "0.45", "0.8", "0.92"  # notes and baselines; axes; grid lines
SERIES = (
    "#1b6ca8",
    "#f58216",
    "#2c9c69",
    "#c0392b",
    "#7b3294",
    "#8c6d31",
    "#12a5dc",
    "#d16ba5",
    "#6b7a89",
    "#a5b02c",
)


def series(number: int) -> str:
    """The color of the line with that number; colors repeat after ten."""
    return SERIES[number % len(SERIES)]


def rgb(color: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a color written as #rrggbb."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
