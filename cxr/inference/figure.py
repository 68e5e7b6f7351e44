"""A figure of a few images with what a checkpoint predicts for them: boxes, masks, heat maps, other pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from cxr import schema
from cxr.imaging.geometry import ResizeTransform, fit_mask, map_to_original
from cxr.inference.explanation import HeatMap
from cxr.reporting.attention import heated
from cxr.reporting.overlays import TILE_PX, BoxPair, MaskPair, Message, Overlay, overlay_figure
from cxr.schema import PixelFormat
from cxr.sources import rle

PICTURE = PixelFormat(TILE_PX)  # of the whole original images that are shown
_NAMED = 2  # findings named above an image

Row = dict[str, Any]


def prediction_figure(
    scores: pa.Table,
    originals: pa.Table,
    findings: Sequence[str],
    heat_maps: Sequence[HeatMap],
    pictures: Mapping[str, Sequence[np.ndarray | None]],
    *,
    finding: str | None,
    min_score: float,
) -> Figure:
    """One column per image, and one row for each kind of prediction.

    Args:
        scores: one row per image.
        originals: the same images, whole, as rows of `PICTURE`.
        findings: of the column `probabilities`.
        heat_maps: one per image; empty if the family has none.
        pictures: further pictures by name, one per image; None where it has an error.
        finding: of the heat maps; None: the most probable one of each image.
        min_score: boxes with a lower score are not shown.
    """
    rows: list[Row] = scores.to_pylist()
    shown = list(_originals(originals))
    is_predicted = {schema.PROBABILITIES, schema.PRED_BOXES, schema.PRED_MASK_RLE} & {*scores.column_names}
    first = [_prediction(*image, findings, min_score) for image in zip(rows, shown, strict=True)]
    tiles = {"prediction" if is_predicted else "image": first}
    if heat_maps:
        maps = zip(rows, shown, heat_maps, strict=True)
        tiles["heat map"] = [_heat(*image, findings, finding) for image in maps]
    for name, of_images in pictures.items():
        tiles[name] = [
            Overlay(row[schema.IMAGE_ID], "", _black() if picture is None else picture)
            for row, picture in zip(rows, of_images, strict=True)
        ]
    return overlay_figure(tiles)


def _originals(rows: pa.Table) -> Iterator[tuple[np.ndarray, ResizeTransform]]:
    """Pictures (S, S) in [0, 1], black where an image cannot be used, and the maps from them to the original."""
    for pixels, transform in zip(
        rows[schema.PIXELS].to_pylist(), rows[schema.RESIZE_TRANSFORM].to_pylist(), strict=True
    ):
        if pixels is None:
            yield _black(), ResizeTransform()
        else:
            picture = np.frombuffer(pixels, PICTURE.dtype).reshape(PICTURE.size, PICTURE.size)
            yield picture / np.float32(255), ResizeTransform.from_dict(transform)


def _black() -> np.ndarray:
    return np.zeros((PICTURE.size, PICTURE.size), np.float32)


def _prediction(
    row: Row, original: tuple[np.ndarray, ResizeTransform], findings: Sequence[str], min_score: float
) -> Overlay:
    """The image with its boxes or mask, and the most probable findings as a note."""
    picture, transform = original
    if row[schema.ERROR] is not None:
        return Overlay(row[schema.IMAGE_ID], "", picture, Message(row[schema.ERROR]))
    notes, pair = [], None
    if probabilities := row.get(schema.PROBABILITIES):
        order = [i for i in np.argsort(probabilities)[::-1] if np.isfinite(probabilities[i])][:_NAMED]
        notes += [f"{findings[i]} {probabilities[i]:.2f}" for i in order]
    if (boxes := row.get(schema.PRED_BOXES)) is not None:
        boxes = [box for box in boxes if box[schema.SCORE] >= min_score]
        corners = [[box[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)] for box in boxes]
        placed = transform.boxes_from_original(np.array(corners).reshape(-1, 4))
        pair = BoxPair(None, (), placed, [f"{box[schema.LABEL]} {box[schema.SCORE]:.2f}" for box in boxes])
        if not boxes:
            notes.append(f"no box with a score of {min_score:g} or more")
    if (code := row.get(schema.PRED_MASK_RLE)) is not None:
        height, width = row[schema.HEIGHT_PX], row[schema.WIDTH_PX]
        mask = rle.decode(code, height, width)
        pair = MaskPair(None, fit_mask(mask, PICTURE.size, transform))
        notes.append(f"{mask.mean():.1%} of the image")
    return Overlay(row[schema.IMAGE_ID], ", ".join(notes), picture, pair)


def _heat(
    row: Row,
    original: tuple[np.ndarray, ResizeTransform],
    heat_map: HeatMap,
    findings: Sequence[str],
    finding: str | None,
) -> Overlay:
    """The image under the heat map of one finding."""
    picture, transform = original
    if row[schema.ERROR] is not None:
        return Overlay(row[schema.IMAGE_ID], "", picture)
    probabilities = row[schema.PROBABILITIES]
    shown = findings.index(finding) if finding else int(np.argmax(np.nan_to_num(probabilities)))
    to_picture = heat_map.transform.then(transform.inverse())
    heat = map_to_original(heat_map.maps[shown], to_picture, *picture.shape)
    return Overlay(row[schema.IMAGE_ID], f"{findings[shown]} {probabilities[shown]:.2f}", heated(picture, heat))
