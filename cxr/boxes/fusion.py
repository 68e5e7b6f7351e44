"""Boxes of several models, or of one, made one set: weighted boxes fusion, NMS, soft-NMS, NMW.

Each takes images, an image being a list of its models' `Found` with boxes as shares of the image ([0, 1]), and
returns a `Found` an image, best score first. Only boxes of one label meet. A model that weighs 0 is as good as
absent; a box without an area is left out; of equal scores the earlier model and its earlier box go first.

Results are those of the package ensemble-boxes 1.0.9 (Solovyev et al.) but where that one fails: its weights of 0
count as models and can give NaN, its order among equal scores is not defined, its soft-NMS returns scores that are
not decayed, and it changes the scores that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cxr.boxes.clusters import blocks, cluster
from cxr.boxes.overlap import paired_iou
from cxr.boxes.predictions import Flat, Found, flat
from cxr.errors import UserError

ConfType = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
Images = Sequence[Sequence[Found]]
_NEXT_TO_NOTHING = 1e-250


def wbf(
    images: Images,
    weights: Sequence[float] | None = None,
    *,
    iou_thr: float = 0.55,
    skip_box_thr: float = 0.0,
    conf_type: ConfType = "avg",
) -> list[Found]:
    """Weighted boxes fusion (Solovyev, Wang, Gabruseva 2021).

    Boxes, best weighted score first, join the fused box that they overlap most, if by more than `iou_thr`; its
    coordinates are the mean of its boxes', weighted by their scores. With s the weighted scores of its n boxes, w
    their models' weights, and W the sum of the weights of all M models, the score is for each `conf_type`:

        avg                     mean(s) min(M, n) / W
        max                     max(s) / the largest weight
        box_and_model_avg       sum(s) / sum(w) x weights of the models in it / W
        absent_model_aware_avg  sum(s) / (sum(w) + weights of the models absent from it)

    Raises:
        UserError: odd weights, thresholds, boxes or scores; no such `conf_type`.
    """
    if conf_type not in get_args(ConfType):
        raise UserError(f"conf_type {conf_type!r}: wanted one of {', '.join(get_args(ConfType))}")
    known = _weights(images, weights)
    found = flat(images, known, _share("skip_box_thr", skip_box_thr))
    leaders = cluster(found.sides.T, found.scores, found.groups, _share("iou_thr", iou_thr), fused=True)
    first, of = _numbered(leaders)
    boxes = _means(found.sides, found.scores, of, len(first))
    return found.split(boxes, _confidences(found, of, len(first), known, conf_type), found.groups[first])


def nms(
    images: Images, weights: Sequence[float] | None = None, *, iou_thr: float = 0.5, skip_box_thr: float = 0.0
) -> list[Found]:
    """Non-maximum suppression: boxes that overlap a better one that stays by more than `iou_thr` go.

    With weights, scores are multiplied by the model's share of them.
    """
    found = flat(images, _shares(images, weights), _share("skip_box_thr", skip_box_thr))
    leaders = cluster(found.sides.T, found.scores, found.groups, _share("iou_thr", iou_thr), fused=False)
    kept, _ = _numbered(leaders)
    return found.split(found.sides[:, kept].T, found.scores[kept], found.groups[kept])


def nmw(
    images: Images, weights: Sequence[float] | None = None, *, iou_thr: float = 0.55, skip_box_thr: float = 0.0
) -> list[Found]:
    """Non-maximum weighted (Zhou et al. 2017): the best box keeps its score and moves to the mean of its cluster.

    The cluster are the boxes that overlap it most and by more than `iou_thr`; each weighs its score times its IoU
    with the best. Scores are multiplied by the model's weight as a share of the largest.
    """
    known = _weights(images, weights)
    found = flat(images, known / known.max(initial=0), _share("skip_box_thr", skip_box_thr))
    leaders = cluster(found.sides.T, found.scores, found.groups, _share("iou_thr", iou_thr), fused=False)
    first, of = _numbered(leaders)
    worth = found.scores * paired_iou(found.sides.T, found.sides.T[leaders])
    return found.split(_means(found.sides, worth, of, len(first)), found.scores[first], found.groups[first])


def soft_nms(
    images: Images,
    weights: Sequence[float] | None = None,
    *,
    method: Literal["linear", "gaussian"] = "gaussian",
    iou_thr: float = 0.5,
    sigma: float = 0.5,
    threshold: float = 0.001,
    skip_box_thr: float = 0.0,
) -> list[Found]:
    """Soft-NMS (Bodla et al. 2017): boxes that overlap a better one lose score; those above `threshold` stay.

    linear: times 1 − IoU where it is above `iou_thr`. gaussian: times exp(−IoU² / sigma). Scores are the decayed
    ones. With weights, they are first multiplied by the model's share of them.
    """
    if method not in ("linear", "gaussian"):
        raise UserError(f"method {method!r}: wanted linear or gaussian")
    if not sigma > 0:
        raise UserError(f"sigma={sigma}: wanted a number above 0")
    found = flat(images, _shares(images, weights), _share("skip_box_thr", skip_box_thr))
    scores = found.scores.copy()
    limits = (_share("iou_thr", iou_thr), sigma, threshold)
    for block in blocks(found.groups) if len(scores) else ():
        given = np.where(block.filled, scores[block.rows], -1.0)
        decayed = _decayed(found.sides[:, block.rows], given, method, *limits)
        scores[block.rows[block.filled]] = decayed[block.filled]
    kept = np.flatnonzero(scores > threshold)
    return found.split(found.sides[:, kept].T, scores[kept], found.groups[kept])


def _decayed(
    boxes_4LG: np.ndarray, scores_LG: np.ndarray, method: str, iou_thr: float, sigma: float, threshold: float
) -> np.ndarray:
    """Scores after decay, by groups side by side; entries of −1 are no boxes. Ends where all left are too low."""
    x0, y0, x1, y1 = boxes_4LG
    area, columns = (x1 - x0) * (y1 - y0), np.arange(scores_LG.shape[1])
    scores, left = scores_LG.copy(), scores_LG.copy()
    while True:
        best = left.argmax(0)
        if not (left[best, columns] > threshold).any():
            return scores
        a0, b0, a1, b1 = boxes_4LG[:, best, columns]
        shared = np.maximum(np.minimum(x1, a1) - np.maximum(x0, a0), 0)
        shared *= np.maximum(np.minimum(y1, b1) - np.maximum(y0, b0), 0)
        iou = shared / (area + area[best, columns] - shared)
        left[best, columns] = -1.0
        fade = np.where(iou > iou_thr, 1 - iou, 1.0) if method == "linear" else np.exp(-(iou**2) / sigma)
        waiting = left >= 0
        np.multiply(left, fade, out=left, where=waiting)
        np.copyto(scores, left, where=waiting)


def _numbered(leaders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) the rows of the boxes that lead a cluster, and (K,) the number of each box's cluster among them."""
    leads = leaders == np.arange(len(leaders))
    return np.flatnonzero(leads), (np.cumsum(leads) - 1)[leaders]


def _means(boxes_4K: np.ndarray, worth_K: np.ndarray, of: np.ndarray, count: int) -> np.ndarray:
    """(C, 4) weighted means by cluster; those of boxes that are worth 0 alone are plain means."""
    worth = np.maximum(worth_K, _NEXT_TO_NOTHING)
    total = np.bincount(of, worth, count)
    return np.stack([np.bincount(of, worth * side, count) / total for side in boxes_4K], 1)


def _confidences(found: Flat, of: np.ndarray, count: int, weights: np.ndarray, conf_type: ConfType) -> np.ndarray:
    """(C,) the score of each cluster, as `wbf` says; models that weigh 0 do not count."""
    size, total = np.bincount(of, minlength=count), np.bincount(of, found.scores, count)
    if conf_type == "avg":
        return total / size * np.minimum((weights > 0).sum(), size) / weights.sum()
    if conf_type == "max":
        highest = np.zeros(count)
        np.maximum.at(highest, of, found.scores)
        return highest / weights.max(initial=0)
    pairs = np.unique(of * len(weights) + found.models)
    present = np.bincount(pairs // max(1, len(weights)), weights[pairs % max(1, len(weights))], count)
    all_boxes = np.bincount(of, weights[found.models], count)
    if conf_type == "box_and_model_avg":
        return total / all_boxes * present / weights.sum()
    return total / (all_boxes + weights.sum() - present)


def _weights(images: Images, weights: Sequence[float] | None) -> np.ndarray:
    """(M,) one a model, ones where none are given; at least one above 0."""
    if weights is None:
        return np.ones(len(images[0]) if len(images) else 1)
    known = np.asarray(weights, np.float64)
    if known.ndim != 1 or not np.isfinite(known).all() or (known < 0).any() or not known.sum() > 0:
        raise UserError(f"weights {weights}: wanted one a model, 0 or more, and one above 0")
    return known


def _shares(images: Images, weights: Sequence[float] | None) -> np.ndarray:
    known = _weights(images, weights)
    return known if weights is None else known / known.sum()


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value}: wanted a number from 0 to 1")
    return value
