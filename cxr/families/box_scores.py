"""The score column of families that find boxes: from shares of the network's square to pixels of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cxr import schema
from cxr.boxes.from_heatmaps import MapBoxes, to_original
from cxr.data.batch import Batch
from cxr.imaging.geometry import ResizeTransform

NAMES, STORED_PX = "finding_names", "stored_px"  # what `predict` gives besides the boxes
_EDGES = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)


def explained(findings: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """What `column` must know besides boxes, as tensors: findings' names (B, bytes), stored pixels to a side (B,)."""
    pixels = batch[schema.PIXELS]
    names = torch.tensor(list("\n".join(findings).encode()), dtype=torch.uint8)
    return {
        NAMES: names.expand(len(pixels), -1),
        STORED_PX: torch.full((len(pixels),), pixels.shape[-1]),
    }


def column(found: Sequence[MapBoxes], predicted: Mapping[str, Tensor], rows: pa.Table) -> pa.Array:
    """A column of `schema.BOX_SCORES`: each row's boxes, the best first; none that lies in the padding alone.

    Args:
        found: of each row; the index of a box is its finding, its score what is written.
        predicted: with what `explained` gave.
        rows: with the columns frame, height and width.
    """
    places = (rows[name].to_pylist() for name in (schema.RESIZE_TRANSFORM, schema.HEIGHT_PX, schema.WIDTH_PX))
    made = [
        _row(boxes, _names(name), ResizeTransform(**frame), stored, height, width)
        for boxes, name, stored, frame, height, width in zip(
            found, predicted[NAMES].cpu(), predicted[STORED_PX].tolist(), *places, strict=True
        )
    ]
    return pa.array(made, schema.BOX_SCORES.field(schema.PRED_BOXES).type)


def _row(
    found: MapBoxes, names: Sequence[str], frame: ResizeTransform, stored: int, height: int, width: int
) -> list[dict[str, str | float]]:
    boxes = to_original(found.boxes_N4, frame, stored, height, width)
    inside = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    order = inside[np.argsort(-found.score_N[inside], kind="stable")].tolist()
    return [
        {schema.LABEL: names[int(found.index_N[i])], schema.SCORE: float(found.score_N[i])}
        | dict(zip(_EDGES, boxes[i].tolist(), strict=True))
        for i in order
    ]


def _names(coded: Tensor) -> list[str]:
    return bytes(coded.tolist()).decode().split("\n")
