"""The boxes of many images as flat arrays, made from the list columns of rows and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.boxes import ScoredBoxes

_CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)


@dataclass(frozen=True)
class Boxes:
    """M boxes of many images; the boxes of an image are adjacent and keep their listed order."""

    image: np.ndarray  # (M,) int64, row of the image
    finding: np.ndarray  # (M,) int64, index of the finding
    xyxy: np.ndarray  # (M, 4) float64
    score: np.ndarray  # (M,) float64, NaN for boxes without a score

    @classmethod
    def of(cls, lists: pa.Array | pa.ChunkedArray, findings: Sequence[str]) -> Boxes:
        """From a column `schema.BOXES` or `schema.PRED_BOXES`; boxes with other labels are left out."""
        chunk = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        boxes = pc.list_flatten(chunk)
        labels = pc.index_in(pc.struct_field(boxes, schema.LABEL), value_set=pa.array(findings, pa.string()))
        named = pc.is_valid(labels).to_numpy(zero_copy_only=False)
        scored = boxes.type.get_field_index(schema.SCORE) >= 0
        score = _floats(boxes, schema.SCORE) if scored else np.full(len(boxes), np.nan)
        xyxy = np.stack([_floats(boxes, name) for name in _CORNERS], axis=1)
        image = pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(image[named], labels.drop_null().to_numpy().astype(np.int64), xyxy[named], score[named])

    @classmethod
    def of_images(cls, images: Sequence[ScoredBoxes]) -> Boxes:
        """From the boxes of each image, whose labels are indices of findings."""
        number = np.repeat(np.arange(len(images)), [len(image.scores) for image in images])
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(ScoredBoxes.empty(), *images, strict=True))
        return cls(number, labels, boxes, scores)

    def by_image(self, images: int) -> list[ScoredBoxes]:
        """The boxes of each of so many images, best score first."""
        order = np.lexsort((-self.score, self.image))
        ends = np.searchsorted(self.image[order], np.arange(images + 1)).tolist()
        parts = (order[start:end] for start, end in pairwise(ends))
        return [ScoredBoxes(self.xyxy[of], self.score[of], self.finding[of]) for of in parts]

    def scaled(self, width_N: np.ndarray, height_N: np.ndarray) -> Boxes:
        """The boxes with x and y multiplied by one number per image, for example its width and height."""
        scale = np.stack([width_N, height_N, width_N, height_N], axis=1)[self.image]
        return replace(self, xyxy=self.xyxy * scale)

    def at(self, index: np.ndarray) -> Boxes:
        """Some of the boxes, by a mask or an index; images keep their rows."""
        return Boxes(self.image[index], self.finding[index], self.xyxy[index], self.score[index])


def _floats(boxes: pa.Array, name: str) -> np.ndarray:
    return pc.struct_field(boxes, name).to_numpy(zero_copy_only=False).astype(np.float64)
