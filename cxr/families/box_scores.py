"""What families that predict boxes share: classifiers whose heat maps become boxes, and boxes as a score column."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from torch import Tensor

from cxr import schema
from cxr.boxes.from_heatmaps import BoxRule, MapBoxes, ThresholdMode, to_original
from cxr.data.batch import to_arrow
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.classifier_base import ClassifierRecipe, redecided
from cxr.imaging.geometry import ResizeTransform

_EDGES = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)


@dataclass(frozen=True, kw_only=True)
class HeatmapBoxesRecipe(ClassifierRecipe):
    """Settings of a classifier that makes boxes of a heat map for each finding."""

    score_columns: ClassVar[pa.Schema] = pa.schema([*ClassifierRecipe.score_columns, *schema.BOX_SCORES])

    box_threshold_mode: ThresholdMode = "fraction"
    """How a map is thresholded before boxes are drawn around its connected regions. fraction: at a fraction of the
    map's maximum; otsu: at Otsu's threshold; wang: at each of two fixed thresholds, 60 and 180 of 255 (Wang et al.
    2017)."""
    box_threshold: float = 0.5
    """Fraction of the map's maximum, for --box-threshold-mode fraction."""
    min_box_score: float = 0.1
    """Minimum of a map's maximum, in [0, 1]: findings whose maps stay below it get no box."""
    max_boxes: int = 3
    """Maximum number of boxes per finding and image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.box_rule
        except ValueError as error:
            raise UserError(f"settings of boxes: {error}") from error

    @property
    def box_rule(self) -> BoxRule:
        """How boxes are made of a heat map."""
        return BoxRule(self.box_threshold_mode, self.box_threshold, self.min_box_score, self.max_boxes)

    @abstractmethod
    def predicted_boxes(self, predicted: Mapping[str, Tensor]) -> Sequence[MapBoxes]:
        """The boxes of each image, from what `predict` returned; a box's index is its finding."""

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        decided = redecided(predicted, context)
        columns = [to_arrow(decided[field.name], field.type) for field in ClassifierRecipe.score_columns]
        boxes = to_box_column(self.predicted_boxes(predicted), rows, context)
        return pa.table([*columns, boxes], schema=self.score_columns)


def to_box_column(predicted: Sequence[MapBoxes], rows: pa.Table, context: ScoringContext) -> pa.Array:
    """Boxes of each row as a column of `schema.BOX_SCORES`, in pixels of the original, in descending order of score.

    Boxes that lie entirely in the padding are dropped.

    Args:
        predicted: one entry per row, in fractions of the stored square; a box's index is its finding.
        rows: with the columns resize_transform, height and width.
    """
    transforms = rows[schema.RESIZE_TRANSFORM].to_pylist()
    heights, widths = rows[schema.HEIGHT_PX].to_pylist(), rows[schema.WIDTH_PX].to_pylist()
    column = []
    for image, transform, height, width in zip(predicted, transforms, heights, widths, strict=True):
        boxes = to_original(image.boxes_N4, ResizeTransform.from_dict(transform), context.stored_size, height, width)
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
