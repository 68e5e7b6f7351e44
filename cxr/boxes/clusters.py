"""Boxes of one group taken best first, each joining the cluster that it overlaps most: for all groups at once.

Whether a box joins a cluster hangs on all boxes before it, so a group cannot be split. But groups know nothing of
each other: they are laid side by side, sorted by length, and all take their j-th box in the same NumPy call. A
block of them is as wide as keeps the block's arrays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 60_000  # clusters x groups of a block
_NEXT_TO_NOTHING = 1e-250  # weight of a box whose score is 0: felt only by a cluster of such boxes


@dataclass(frozen=True)
class Block:
    """Groups side by side, the longest first: columns; row j holds each one's j-th box."""

    rows: np.ndarray  # (L, G) of the flat list; meaningless where a group is shorter
    filled: np.ndarray  # (L, G) bool: the group has a j-th box

    @property
    def widths(self) -> list[int]:
        """How many groups have a box, by step."""
        return self.filled.sum(1).tolist()


def blocks(groups: np.ndarray) -> Iterator[Block]:
    """Blocks of the groups of a flat list; `groups` (K,) rises from 0 in whole steps."""
    lengths = np.bincount(groups)
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        longest = int(lengths[order[at]])
        chosen = order[at : at + max(16, _BLOCK // longest)]
        steps = np.arange(longest)[:, None]
        yield Block(np.minimum(starts[chosen] + steps, len(groups) - 1), steps < lengths[chosen])
        at += len(chosen)


def cluster(
    boxes_K4: np.ndarray, scores_K: np.ndarray, groups: np.ndarray, iou_thr: float, *, fused: bool
) -> np.ndarray:
    """(K,) the row of the first box of the cluster that each box joins: the one that it overlaps most, above the IoU.

    Args:
        boxes_K4: with an area each; group by group, best score first; `groups` rise from 0 in whole steps.
        fused: overlap is with the mean of the cluster's boxes, weighted by score (Solovyev et al. 2021); else with
            the first of them.
    """
    leaders = np.empty(len(scores_K), np.int64)
    boxes_4K = np.ascontiguousarray(boxes_K4.T)
    weighed = np.concatenate([boxes_4K, np.ones((1, len(scores_K)))])
    if fused:
        weighed *= np.maximum(scores_K, _NEXT_TO_NOTHING)
    for block in blocks(groups) if len(groups) else ():
        joined = _joined(block, boxes_4K, weighed, iou_thr, fused)
        rows = block.rows[block.filled]
        leaders[rows] = _first_rows(block, joined)[block.filled]
    return leaders


def _joined(block: Block, boxes_4K: np.ndarray, weighed_5K: np.ndarray, iou_thr: float, fused: bool) -> np.ndarray:
    """(L, G) the number of the cluster that each box of a block joins; 0 where there is no box."""
    steps, groups = block.rows.shape
    clusters, joined = _Clusters(steps, groups), np.zeros((steps, groups), np.int64)
    for step, width in enumerate(block.widths):
        rows = block.rows[step, :width]
        boxes = np.take(boxes_4K, rows, axis=1)
        best, overlap = clusters.nearest(boxes)
        new = overlap <= iou_thr
        joined[step, :width] = np.where(new, clusters.used[:width], best)
        clusters.used[:width] += new
        if fused:
            clusters.fuse(joined[step, :width], np.take(weighed_5K, rows, axis=1))
        else:
            columns = np.flatnonzero(new)
            clusters.put(joined[step, columns] * groups + columns, boxes[:, columns])
    return joined


def _first_rows(block: Block, joined: np.ndarray) -> np.ndarray:
    """(L, G) the row of the flat list at which each box's cluster begins."""
    before = np.zeros_like(joined)
    np.maximum.accumulate(joined[:-1] + 1, axis=0, out=before[1:])
    new = (joined >= before) & block.filled
    columns = np.broadcast_to(np.arange(joined.shape[1]), joined.shape)
    first = np.zeros_like(joined)
    first[joined[new], columns[new]] = block.rows[new]
    return first[joined, columns]


class _Clusters:
    """The clusters of a block's groups, (C, G); those not yet begun have no area."""

    def __init__(self, steps: int, groups: int) -> None:
        self.boxes = np.full((5, steps, groups), -1.0)  # and their areas
        self.boxes[4] = 0
        self.sums = np.zeros((5, steps * groups))  # of weight times coordinates, and of the weights
        self.used = np.zeros(groups, np.int64)
        self._memory = np.empty((3, steps * groups))

    def nearest(self, boxes_4G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(G,) the cluster that each group's box overlaps most, the earliest of equals, and that IoU; or one <= 0."""
        width = boxes_4G.shape[1]
        begun = max(1, int(self.used[:width].max()))
        x0, y0, x1, y1, areas = self.boxes[:, :begun, :width]
        wide, high, other = (m[: begun * width].reshape(begun, width) for m in self._memory)
        np.minimum(x1, boxes_4G[2], out=wide)
        wide -= np.maximum(x0, boxes_4G[0], out=other)
        np.maximum(wide, 0, out=wide)
        np.minimum(y1, boxes_4G[3], out=high)
        high -= np.maximum(y0, boxes_4G[1], out=other)
        wide *= high
        np.add(areas, _area(boxes_4G), out=other)
        other -= wide
        wide /= other
        best = wide.argmax(0)
        return best, wide[best, np.arange(width)]

    def fuse(self, cluster: np.ndarray, weighed_5G: np.ndarray) -> None:
        """Move each group's cluster to the mean of its boxes and this one."""
        cells = cluster * self.boxes.shape[2] + np.arange(len(cluster))
        sums = np.take(self.sums, cells, axis=1)
        sums += weighed_5G
        self.sums[:, cells] = sums
        sums /= sums[4]
        self.put(cells, sums[:4])

    def put(self, cells: np.ndarray, boxes_4G: np.ndarray) -> None:
        """Set the boxes that stand for these clusters, cells of (C, G) in one row."""
        flat = self.boxes.reshape(5, -1)
        flat[:4, cells] = boxes_4G
        flat[4, cells] = _area(boxes_4G)


def _area(boxes_4G: np.ndarray) -> np.ndarray:
    return (boxes_4G[2] - boxes_4G[0]) * (boxes_4G[3] - boxes_4G[1])
