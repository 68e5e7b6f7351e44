"""A contact sheet of phantoms with their findings, boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from cxr.phantom.archive import Exam
from cxr.phantom.render import Phantom
from cxr.schema import FINDINGS, LUNGS

_TILE = 384
_LUNGS_COLOR = (140, 110, 60)  # blue, green, red


def contact_sheet(exams: Sequence[Exam], columns: int = 6) -> NDArray[np.uint8]:
    """Tiles of `_TILE` px, row by row: (H, W, 3) uint8 in BGR order."""
    tiles = [_tile(exam.phantom, exam.image_id) for exam in exams]
    columns = min(columns, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def _tile(phantom: Phantom, image_id: str) -> NDArray[np.uint8]:
    shrink = cv2.INTER_AREA if len(phantom.pixels) > _TILE else cv2.INTER_LINEAR
    tile = cv2.cvtColor(cv2.resize(phantom.pixels, (_TILE, _TILE), interpolation=shrink), cv2.COLOR_GRAY2BGR)
    for label, mask in phantom.masks.items():
        small = cv2.resize(mask.astype(np.uint8), (_TILE, _TILE), interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, outlines, -1, _color(label), 1)
    scale = _TILE / len(phantom.pixels)
    for box in phantom.boxes:
        x_min, y_min, x_max, y_max = (round(scale * edge) for edge in box.xyxy_px)
        cv2.rectangle(tile, (x_min, y_min), (x_max, y_max), _color(box.label), 1)
    lines = [image_id, *phantom.labels]
    for row, (line, color) in enumerate(zip(lines, [(255, 255, 255), *map(_color, lines[1:])], strict=True)):
        cv2.putText(tile, line, (6, 16 + 15 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.42, color, 1, cv2.LINE_AA)
    return np.asarray(tile, np.uint8)


def _color(label: str) -> tuple[int, int, int]:
    if label == LUNGS:
        return _LUNGS_COLOR
    hue = np.uint8(180 * FINDINGS.index(label) / len(FINDINGS))
    blue, green, red = cv2.cvtColor(np.array([[[hue, 170, 255]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    return int(blue), int(green), int(red)
