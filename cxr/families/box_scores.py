"""Predicted boxes as a score column: from fractions of the network's square input to pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.boxes.from_heatmaps import MapBoxes, to_original
from cxr.families.base import ScoringContext
from cxr.imaging.geometry import ResizeTransform

_EDGES = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)


def to_box_column(predicted: Sequence[MapBoxes], rows: pa.Table, context: ScoringContext) -> pa.Array:
    """Boxes of each row as a column of `schema.BOX_SCORES`, in descending order of score.

    Boxes that lie entirely in the padding are dropped.

    Args:
        predicted: one entry per row; a box's index is its finding.
        rows: with the columns resize_transform, height and width.
    """
    transforms = rows[schema.RESIZE_TRANSFORM].to_pylist()
    heights, widths = rows[schema.HEIGHT_PX].to_pylist(), rows[schema.WIDTH_PX].to_pylist()
    column = []
    for image, transform, height, width in zip(predicted, transforms, heights, widths, strict=True):
        boxes = to_original(image.boxes_N4, ResizeTransform(**transform), context.stored_size, height, width)
        inside = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
        order = inside[np.argsort(-image.score_N[inside], kind="stable")].tolist()
        column.append(
            [
                {schema.LABEL: context.findings[int(image.index_N[i])], schema.SCORE: float(image.score_N[i])}
                | dict(zip(_EDGES, boxes[i].tolist(), strict=True))
                for i in order
            ]
        )
    return pa.array(column, schema.BOX_SCORES.field(schema.PRED_BOXES).type)
