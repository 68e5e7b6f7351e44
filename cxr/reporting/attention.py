"""Attention of a network: heat maps over X-rays, boxes, and the weights of its stages as a table of colors.

Color pictures are uint8 (H, W, 3) in red, green, blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from cxr.reporting import palette
from cxr.reporting.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT = 255, 255, 255
_STRONGEST = 0.65  # fraction of color where a map is 1
_LETTERS = 0.0016  # font scale per pixel of the picture's height


def heated(picture_HW: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """A picture in [0, 1] under a map in [0, 1], which leaves it gray where it is 0."""
    heat = cv2.resize(map_hw.astype(np.float32), picture_HW.shape[::-1], interpolation=cv2.INTER_LINEAR)
    colors = cv2.applyColorMap(np.rint(255 * heat.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    much = _STRONGEST * heat.clip(0, 1)[..., None]
    return np.rint((1 - much) * 255 * picture_HW[..., None] + much * colors).astype(np.uint8)


def scale_strip() -> np.ndarray:
    """The colors of `heated` from 0 to 1, left to right, over a gray picture, (8, 64, 3) in [0, 1]."""
    return heated(np.full((8, 64), 0.5), np.tile(np.linspace(0, 1, 64), (8, 1))) / 255


def colored(picture_HW: np.ndarray) -> np.ndarray:
    """A picture in [0, 1] as a color picture."""
    return np.repeat(np.rint(255 * picture_HW).astype(np.uint8)[..., None], 3, 2)


def boxed(picture_HW3: np.ndarray, boxes_N4: np.ndarray, color: str = palette.PREDICTION) -> np.ndarray:
    """A picture with the outlines of boxes, which are fractions of its width and height."""
    height, width = picture_HW3.shape[:2]
    canvas = np.ascontiguousarray(picture_HW3)
    for x_min, y_min, x_max, y_max in np.rint(boxes_N4 * (width, height, width, height)).astype(int).tolist():
        cv2.rectangle(canvas, (x_min, y_min), (x_max - 1, y_max - 1), palette.rgb(color), max(1, height // 256))
    return canvas


def titled(picture_HW3: np.ndarray, text: str) -> np.ndarray:
    """A picture with a line of text on a darkened strip along its upper edge."""
    canvas = np.ascontiguousarray(picture_HW3)
    scale = max(0.3, _LETTERS * len(canvas))
    strip = round(36 * scale)
    canvas[:strip] //= 2
    cv2.putText(canvas, text, (3, round(26 * scale)), cv2.FONT_HERSHEY_SIMPLEX, scale, _TEXT, 1, cv2.LINE_AA)
    return canvas


def stage_weights_figure(weights_SF: np.ndarray, findings: Sequence[str], stages: Sequence[str]) -> Figure:
    """Table of the weight of each stage's map, as a number and a color: one row per finding, one column per stage."""
    figure = new_figure(1.8 + 0.9 * len(stages), 0.9 + 0.3 * len(findings))
    ax = figure.subplots()
    ax.imshow(weights_SF.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (stage, finding), weight in np.ndenumerate(weights_SF):
        ax.text(
            stage, finding, f"{weight:.2f}", ha="center", va="center", fontsize=8, color="w" if weight > 0.6 else "k"
        )
    ax.set_xticks(range(len(stages)), list(stages), fontsize=8)
    ax.set_yticks(range(len(findings)), list(findings), fontsize=8)
    ax.tick_params(length=0)
    ax.set_title("weights of the stages", loc="left", fontsize=9)
    return figure
