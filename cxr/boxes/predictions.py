"""What models have found in images, and the same as one flat list that is worked on at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr.errors import UserError


class Found(NamedTuple):
    """Boxes of one image; rows go together."""

    boxes: np.ndarray  # (K, 4)
    scores: np.ndarray  # (K,) 0 or more
    labels: np.ndarray  # (K,) whole numbers

    @classmethod
    def nothing(cls) -> Found:
        """No box at all."""
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Flat:
    """All boxes of all images and models, group by group (an image and a label), best score first.

    Of equal scores the earlier model comes first, then the box that it names earlier.
    """

    sides: np.ndarray  # (4, K) in [0, 1]: x_min, y_min, x_max, y_max of boxes that have an area
    scores: np.ndarray  # (K,) times the model's weight
    models: np.ndarray  # (K,)
    groups: np.ndarray  # (K,) rising
    images: np.ndarray  # (G,) of each group
    labels: np.ndarray  # (G,)
    image_count: int

    def split(self, boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> list[Found]:
        """Boxes with their groups, rising, as a list by image: best score first, of equal ones the lower label."""
        images, labels = self.images[groups], self.labels[groups]
        order = _sorted(np.arange(len(groups)), -scores, images)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        ends = np.searchsorted(images[order], np.arange(1, self.image_count + 1)).tolist()
        starts = [0, *ends][:-1]
        return [Found(boxes[a:b], scores[a:b], labels[a:b]) for a, b in zip(starts, ends, strict=True)]


def flat(images: Sequence[Sequence[Found]], weights: np.ndarray, skip_box_thr: float) -> Flat:
    """One list of the boxes of each image's models, boxes as shares of the image.

    Corners are put in order and clipped to [0, 1]. Boxes without an area, with a score (before weighting) below
    `skip_box_thr`, or of a model that weighs 0 are left out.

    Raises:
        UserError: an image with another number of models than weights, rows that do not go together, a score that
            is negative, or a number that is not finite.
    """
    if odd := [len(models) for models in images if len(models) != len(weights)]:
        raise UserError(f"an image with boxes of {odd[0]} models, {len(weights)} weights: wanted one a model")
    boxes, scores, labels, lengths = _joined([found for models in images for found in models])
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and (scores >= 0).all()):
        raise UserError("boxes or scores that are not finite, or scores below 0: wanted scores in [0, 1]")
    image, model = np.divmod(np.repeat(np.arange(len(lengths)), lengths), max(1, len(weights)))
    boxes = np.concatenate([np.minimum(boxes[:2], boxes[2:]), np.maximum(boxes[:2], boxes[2:])]).clip(0, 1)
    weight = weights[model]
    kept = (scores >= skip_box_thr) & (weight > 0) & (boxes[0] < boxes[2]) & (boxes[1] < boxes[3])
    scores = scores * weight
    order = _sorted(np.flatnonzero(kept), -scores, labels, image)
    boxes = np.take(boxes, order, axis=1)
    scores, labels, image, model = (np.take(of, order) for of in (scores, labels, image, model))
    first = np.ones(len(scores), bool)
    first[1:] = (image[1:] != image[:-1]) | (labels[1:] != labels[:-1])
    return Flat(boxes, scores, model, np.cumsum(first) - 1, image[first], labels[first], len(images))


def _sorted(rows: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Rows by the last of the keys, where it is equal by the one before it, where all are, as they stand."""
    for key in keys:
        rows = rows[np.argsort(_narrow(key[rows]), kind="stable")]
    return rows


def _narrow(keys: np.ndarray) -> np.ndarray:
    """Keys of the same order in 16 bits where they fit: NumPy sorts these by radix, twenty times as fast."""
    if len(keys) and keys.dtype.kind == "i" and keys.max() - keys.min() < 2**16:
        return (keys - keys.min()).astype(np.uint16)
    return keys


def _joined(parts: Sequence[Found]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (4, K), scores and labels (K,) one after the other, and how many each part has."""
    lengths = np.array([len(scores) for _, scores, _ in parts], int)
    if any(not len(boxes) == len(scores) == len(labels) for boxes, scores, labels in parts):
        raise UserError("boxes, scores and labels of different lengths: wanted a score and a label for each box")
    if not lengths.sum():
        return np.zeros((4, 0)), *Found.nothing()[1:], lengths
    boxes, scores, labels = (np.concatenate([part[of] for part in parts if len(part[1])]) for of in range(3))
    return boxes.T.astype(np.float64, "C"), scores.astype(np.float64), labels.astype(np.int64), lengths
