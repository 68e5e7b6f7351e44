"""Predicted boxes, by image and as one flat list for vectorized processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr.errors import UserError
from cxr.wording import counted


class ScoredBoxes(NamedTuple):
    """Boxes of an image with a score and a label each."""

    boxes: np.ndarray  # (K, 4)
    scores: np.ndarray  # (K,) 0 or more
    labels: np.ndarray  # (K,) integers

    @classmethod
    def empty(cls) -> ScoredBoxes:
        """No boxes."""
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Flat:
    """All boxes of all images and models, by group (image and label) and then by descending score.

    Among equal scores, the earlier model and then its earlier box come first.
    """

    sides: np.ndarray  # (4, K) x_min, y_min, x_max, y_max in [0, 1], with positive area
    scores: np.ndarray  # (K,) times the model's weight
    models: np.ndarray  # (K,)
    groups: np.ndarray  # (K,) group numbers, increasing
    images: np.ndarray  # (G,) image of each group
    labels: np.ndarray  # (G,)
    image_count: int

    def split(self, boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> list[ScoredBoxes]:
        """Split boxes by image; `groups` must increase. Highest score first; the lower label first among equal
        scores."""
        images, labels = self.images[groups], self.labels[groups]
        order = _lexsort(np.arange(len(groups)), -scores, images)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        ends = np.searchsorted(images[order], np.arange(1, self.image_count + 1)).tolist()
        starts = [0, *ends][:-1]
        return [ScoredBoxes(boxes[a:b], scores[a:b], labels[a:b]) for a, b in zip(starts, ends, strict=True)]


def flat(images: Sequence[Sequence[ScoredBoxes]], weights: np.ndarray, skip_box_thr: float) -> Flat:
    """Flatten the boxes of each image's models, given as fractions of the image.

    Corners are sorted and clipped to [0, 1]. Boxes without area, with a score (before weighting) below
    `skip_box_thr`, or of a model with weight 0 are dropped.

    Raises:
        UserError: the number of models of an image differs from that of the weights, arrays differ in length, a score
            is negative, or a number is not finite.
    """
    if counts := [len(models) for models in images if len(models) != len(weights)]:
        raise UserError(
            f"expected as many weights as models, got {counted(len(weights), 'weight')} and an image with the boxes "
            f"of {counted(counts[0], 'model')}: use one weight per model"
        )
    boxes, scores, labels, lengths = _concatenate([scored for models in images for scored in models])
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and (scores >= 0).all()):
        raise UserError("expected finite boxes and finite scores of at least 0, got others: remove them")
    image, model = np.divmod(np.repeat(np.arange(len(lengths)), lengths), max(1, len(weights)))
    boxes = np.concatenate([np.minimum(boxes[:2], boxes[2:]), np.maximum(boxes[:2], boxes[2:])]).clip(0, 1)
    weight = weights[model]
    keep = (scores >= skip_box_thr) & (weight > 0) & (boxes[0] < boxes[2]) & (boxes[1] < boxes[3])
    scores = scores * weight
    order = _lexsort(np.flatnonzero(keep), -scores, labels, image)
    boxes = np.take(boxes, order, axis=1)
    scores, labels, image, model = (np.take(of, order) for of in (scores, labels, image, model))
    first = np.ones(len(scores), bool)
    first[1:] = (image[1:] != image[:-1]) | (labels[1:] != labels[:-1])
    return Flat(boxes, scores, model, np.cumsum(first) - 1, image[first], labels[first], len(images))


def _lexsort(rows: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Stable lexicographic argsort of `rows`; the last key is primary, as in `np.lexsort`, which is slower (see
    `_narrow`)."""
    for key in keys:
        rows = rows[np.argsort(_narrow(key[rows]), kind="stable")]
    return rows


def _narrow(keys: np.ndarray) -> np.ndarray:
    """Keys of the same order as uint16, if they fit: NumPy uses radix sort for these, twenty times as fast."""
    if len(keys) and keys.dtype.kind == "i" and keys.max() - keys.min() < 2**16:
        return (keys - keys.min()).astype(np.uint16)
    return keys


def _concatenate(parts: Sequence[ScoredBoxes]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Concatenated boxes (4, K), scores and labels (K,), and the length of each part."""
    lengths = np.array([len(scores) for _, scores, _ in parts], int)
    if any(not len(boxes) == len(scores) == len(labels) for boxes, scores, labels in parts):
        raise UserError(
            "expected a score and a label for each box, got arrays of different lengths: give all three one row for "
            "each box"
        )
    if not lengths.sum():
        return np.zeros((4, 0)), *ScoredBoxes.empty()[1:], lengths
    boxes, scores, labels = (np.concatenate([part[of] for part in parts if len(part[1])]) for of in range(3))
    return boxes.T.astype(np.float64, "C"), scores.astype(np.float64), labels.astype(np.int64), lengths
