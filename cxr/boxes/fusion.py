"""Fuse the boxes of one or several models: weighted boxes fusion, NMS, soft-NMS, NMW.

Each function takes a list of images; an image is a list with one `ScoredBoxes` per model, with boxes as fractions of
the image ([0, 1]). It returns one `ScoredBoxes` per image, highest score first. Labels are processed separately.
Models with weight 0 and boxes without area are ignored; among equal scores, the earlier model and its earlier box
come first.

Results equal those of the package ensemble-boxes 1.0.9 (Solovyev et al.) except for its defects: it counts models
with weight 0, which can give NaN; its order among equal scores is undefined; its soft-NMS returns the original
instead of the decayed scores; and it modifies its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cxr.boxes.clusters import blocks, cluster
from cxr.boxes.overlap import paired_iou
from cxr.boxes.predictions import Flat, ScoredBoxes, flat
from cxr.errors import UserError

ConfType = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
Images = Sequence[Sequence[ScoredBoxes]]
_TINY_WEIGHT = 1e-250


def wbf(
    images: Images,
    weights: Sequence[float] | None = None,
    *,
    iou_thr: float = 0.55,
    skip_box_thr: float = 0.0,
    conf_type: ConfType = "avg",
) -> list[ScoredBoxes]:
    """Weighted boxes fusion (Solovyev, Wang, Gabruseva 2021).

    Boxes, in order of weighted score, join the fused box with the highest IoU, if it exceeds `iou_thr`; the fused
    coordinates are the mean of its boxes, weighted by score. With s the weighted scores of its n boxes, w their
    models' weights, and W the sum of the weights of all M models, the score is, by `conf_type`:

        avg                     mean(s) min(M, n) / W
        max                     max(s) / the largest weight
        box_and_model_avg       sum(s) / sum(w) x weights of the models in it / W
        absent_model_aware_avg  sum(s) / (sum(w) + weights of the models absent from it)

    Raises:
        UserError: invalid weights, thresholds, boxes, scores or `conf_type`.
    """
    if conf_type not in get_args(ConfType):
        raise UserError(
            f"expected conf_type to be one of {', '.join(get_args(ConfType))}, got {conf_type!r}: choose one"
        )
    model_weights = _weights(images, weights)
    flat_boxes = flat(images, model_weights, _unit_interval("skip_box_thr", skip_box_thr))
    leaders = cluster(
        flat_boxes.sides.T, flat_boxes.scores, flat_boxes.groups, _unit_interval("iou_thr", iou_thr), fused=True
    )
    first, cluster_of = _number_clusters(leaders)
    boxes = _means(flat_boxes.sides, flat_boxes.scores, cluster_of, len(first))
    return flat_boxes.split(
        boxes, _confidences(flat_boxes, cluster_of, len(first), model_weights, conf_type), flat_boxes.groups[first]
    )


def nms(
    images: Images, weights: Sequence[float] | None = None, *, iou_thr: float = 0.5, skip_box_thr: float = 0.0
) -> list[ScoredBoxes]:
    """Non-maximum suppression: remove boxes whose IoU with a retained box of higher score exceeds `iou_thr`.

    With weights, scores are multiplied by the model's weight divided by the sum of weights.
    """
    flat_boxes = flat(images, _normalized_weights(images, weights), _unit_interval("skip_box_thr", skip_box_thr))
    leaders = cluster(
        flat_boxes.sides.T, flat_boxes.scores, flat_boxes.groups, _unit_interval("iou_thr", iou_thr), fused=False
    )
    keep, _ = _number_clusters(leaders)
    return flat_boxes.split(flat_boxes.sides[:, keep].T, flat_boxes.scores[keep], flat_boxes.groups[keep])


def nmw(
    images: Images, weights: Sequence[float] | None = None, *, iou_thr: float = 0.55, skip_box_thr: float = 0.0
) -> list[ScoredBoxes]:
    """Non-maximum weighted (Zhou et al. 2017): the best box keeps its score and moves to the mean of its cluster.

    Its cluster contains the boxes for which it has the highest IoU, if above `iou_thr`; each is weighted by its score
    times its IoU with the best box. Scores are multiplied by the model's weight divided by the largest weight.
    """
    model_weights = _weights(images, weights)
    flat_boxes = flat(
        images, model_weights / model_weights.max(initial=0), _unit_interval("skip_box_thr", skip_box_thr)
    )
    leaders = cluster(
        flat_boxes.sides.T, flat_boxes.scores, flat_boxes.groups, _unit_interval("iou_thr", iou_thr), fused=False
    )
    first, cluster_of = _number_clusters(leaders)
    box_weights = flat_boxes.scores * paired_iou(flat_boxes.sides.T, flat_boxes.sides.T[leaders])
    return flat_boxes.split(
        _means(flat_boxes.sides, box_weights, cluster_of, len(first)),
        flat_boxes.scores[first],
        flat_boxes.groups[first],
    )


def soft_nms(
    images: Images,
    weights: Sequence[float] | None = None,
    *,
    method: Literal["linear", "gaussian"] = "gaussian",
    iou_thr: float = 0.5,
    sigma: float = 0.5,
    threshold: float = 0.001,
    skip_box_thr: float = 0.0,
) -> list[ScoredBoxes]:
    """Soft-NMS (Bodla et al. 2017): scores decay with the overlap with better boxes; those above `threshold` stay.

    linear: factor 1 − IoU if the IoU exceeds `iou_thr`. gaussian: factor exp(−IoU² / sigma). Returns the decayed
    scores. With weights, scores are first multiplied by the model's weight divided by the sum of weights.
    """
    if method not in ("linear", "gaussian"):
        raise UserError(f"expected method to be linear or gaussian, got {method!r}: choose one")
    if not sigma > 0:
        raise UserError(f"expected sigma above 0, got {sigma}: use a positive number")
    flat_boxes = flat(images, _normalized_weights(images, weights), _unit_interval("skip_box_thr", skip_box_thr))
    scores = flat_boxes.scores.copy()
    limits = (_unit_interval("iou_thr", iou_thr), sigma, threshold)
    for block in blocks(flat_boxes.groups) if len(scores) else ():
        initial = np.where(block.filled, scores[block.rows], -1.0)
        decayed = _decay(flat_boxes.sides[:, block.rows], initial, method, *limits)
        scores[block.rows[block.filled]] = decayed[block.filled]
    keep = np.flatnonzero(scores > threshold)
    return flat_boxes.split(flat_boxes.sides[:, keep].T, scores[keep], flat_boxes.groups[keep])


def _decay(
    boxes_4LG: np.ndarray, scores_LG: np.ndarray, method: str, iou_thr: float, sigma: float, threshold: float
) -> np.ndarray:
    """Decayed scores of groups side by side; −1 marks missing boxes. Stops when the remaining scores are too low."""
    x0, y0, x1, y1 = boxes_4LG
    area, columns = (x1 - x0) * (y1 - y0), np.arange(scores_LG.shape[1])
    scores, remaining = scores_LG.copy(), scores_LG.copy()
    while True:
        best = remaining.argmax(0)
        if not (remaining[best, columns] > threshold).any():
            return scores
        a0, b0, a1, b1 = boxes_4LG[:, best, columns]
        shared = np.maximum(np.minimum(x1, a1) - np.maximum(x0, a0), 0)
        shared *= np.maximum(np.minimum(y1, b1) - np.maximum(y0, b0), 0)
        iou = shared / (area + area[best, columns] - shared)
        remaining[best, columns] = -1.0
        factor = np.where(iou > iou_thr, 1 - iou, 1.0) if method == "linear" else np.exp(-(iou**2) / sigma)
        pending = remaining >= 0
        np.multiply(remaining, factor, out=remaining, where=pending)
        np.copyto(scores, remaining, where=pending)


def _number_clusters(leaders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) the row of each cluster's first box, and (K,) the number of each box's cluster."""
    is_leader = leaders == np.arange(len(leaders))
    return np.flatnonzero(is_leader), (np.cumsum(is_leader) - 1)[leaders]


def _means(boxes_4K: np.ndarray, box_weights_K: np.ndarray, cluster_of: np.ndarray, count: int) -> np.ndarray:
    """(C, 4) weighted means by cluster; plain means if all weights of a cluster are 0."""
    box_weights = np.maximum(box_weights_K, _TINY_WEIGHT)
    total = np.bincount(cluster_of, box_weights, count)
    return np.stack([np.bincount(cluster_of, box_weights * side, count) / total for side in boxes_4K], 1)


def _confidences(
    flat_boxes: Flat, cluster_of: np.ndarray, count: int, weights: np.ndarray, conf_type: ConfType
) -> np.ndarray:
    """(C,) the score of each cluster, as documented in `wbf`; models with weight 0 do not count."""
    size, total = np.bincount(cluster_of, minlength=count), np.bincount(cluster_of, flat_boxes.scores, count)
    if conf_type == "avg":
        return total / size * np.minimum((weights > 0).sum(), size) / weights.sum()
    if conf_type == "max":
        highest = np.zeros(count)
        np.maximum.at(highest, cluster_of, flat_boxes.scores)
        return highest / weights.max(initial=0)
    pairs = np.unique(cluster_of * len(weights) + flat_boxes.models)
    present = np.bincount(pairs // max(1, len(weights)), weights[pairs % max(1, len(weights))], count)
    all_boxes = np.bincount(cluster_of, weights[flat_boxes.models], count)
    if conf_type == "box_and_model_avg":
        return total / all_boxes * present / weights.sum()
    return total / (all_boxes + weights.sum() - present)


def _weights(images: Images, weights: Sequence[float] | None) -> np.ndarray:
    """(M,) one weight per model, ones by default; at least one is above 0."""
    if weights is None:
        return np.ones(len(images[0]) if len(images) else 1)
    model_weights = np.asarray(weights, np.float64)
    if (
        model_weights.ndim != 1
        or not np.isfinite(model_weights).all()
        or (model_weights < 0).any()
        or not model_weights.sum() > 0
    ):
        raise UserError(
            f"expected weights of 0 or more, at least one above 0, got {weights}: give a model that counts a "
            "positive weight"
        )
    return model_weights


def _normalized_weights(images: Images, weights: Sequence[float] | None) -> np.ndarray:
    model_weights = _weights(images, weights)
    return model_weights if weights is None else model_weights / model_weights.sum()


def _unit_interval(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"expected {name} from 0 to 1, got {value}: use a fraction, such as 0.5")
    return value
