"""Greedy clustering of boxes in score order, each joining the cluster that it overlaps most, for all groups at once.

Which cluster a box joins depends on all earlier boxes of its group, so a group is processed sequentially. Groups are
independent: they are sorted by length and processed side by side, each NumPy call handling the j-th box of all
groups. A block has as many groups as keep its arrays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 60_000  # clusters x groups per block
_TINY_WEIGHT = 1e-250  # weight of a box with score 0; matters only if all boxes of the cluster have it


@dataclass(frozen=True)
class Block:
    """Groups side by side, one per column, longest first; row j contains the j-th box of each group."""

    rows: np.ndarray  # (L, G) index into the flat list; undefined where a group is shorter
    filled: np.ndarray  # (L, G) bool: the group has a j-th box

    @property
    def widths(self) -> list[int]:
        """Number of groups with a j-th box, for each step j."""
        return self.filled.sum(1).tolist()


def blocks(groups: np.ndarray) -> Iterator[Block]:
    """Blocks of the groups of a flat list; `groups` (K,) increases from 0 in steps of 0 or 1."""
    lengths = np.bincount(groups)
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        block_groups = order[start : start + max(16, _BLOCK // longest)]
        steps = np.arange(longest)[:, None]
        yield Block(np.minimum(starts[block_groups] + steps, len(groups) - 1), steps < lengths[block_groups])
        start += len(block_groups)


def cluster(
    boxes_K4: np.ndarray, scores_K: np.ndarray, groups: np.ndarray, iou_thr: float, *, fused: bool
) -> np.ndarray:
    """(K,) for each box, the row of the first box of its cluster: the one with the highest IoU, if above `iou_thr`.

    Args:
        boxes_K4: boxes with positive area, by group and then by descending score; `groups` increase from 0.
        fused: compute the overlap with the score-weighted mean of the cluster's boxes (Solovyev et al. 2021) instead
            of with its first box.
    """
    leaders = np.empty(len(scores_K), np.int64)
    boxes_4K = np.ascontiguousarray(boxes_K4.T)
    weighted = np.concatenate([boxes_4K, np.ones((1, len(scores_K)))])
    if fused:
        weighted *= np.maximum(scores_K, _TINY_WEIGHT)
    for block in blocks(groups) if len(groups) else ():
        assigned = _assign(block, boxes_4K, weighted, iou_thr, fused)
        rows = block.rows[block.filled]
        leaders[rows] = _first_rows(block, assigned)[block.filled]
    return leaders


def _assign(block: Block, boxes_4K: np.ndarray, weighted_5K: np.ndarray, iou_thr: float, fused: bool) -> np.ndarray:
    """(L, G) the number of the cluster that each box of a block joins; 0 if there is no box."""
    steps, groups = block.rows.shape
    clusters, assigned = _Clusters(steps, groups), np.zeros((steps, groups), np.int64)
    for step, width in enumerate(block.widths):
        rows = block.rows[step, :width]
        boxes = np.take(boxes_4K, rows, axis=1)
        best, overlap = clusters.nearest(boxes)
        new = overlap <= iou_thr
        assigned[step, :width] = np.where(new, clusters.used[:width], best)
        clusters.used[:width] += new
        if fused:
            clusters.fuse(assigned[step, :width], np.take(weighted_5K, rows, axis=1))
        else:
            columns = np.flatnonzero(new)
            clusters.put(assigned[step, columns] * groups + columns, boxes[:, columns])
    return assigned


def _first_rows(block: Block, assigned: np.ndarray) -> np.ndarray:
    """(L, G) the row in the flat list of the first box of each box's cluster."""
    before = np.zeros_like(assigned)
    np.maximum.accumulate(assigned[:-1] + 1, axis=0, out=before[1:])
    new = (assigned >= before) & block.filled
    columns = np.broadcast_to(np.arange(assigned.shape[1]), assigned.shape)
    first = np.zeros_like(assigned)
    first[assigned[new], columns[new]] = block.rows[new]
    return first[assigned, columns]


class _Clusters:
    """The clusters of a block's groups, (C, G); unused ones have zero area."""

    def __init__(self, steps: int, groups: int) -> None:
        self.boxes = np.full((5, steps, groups), -1.0)  # coordinates and area
        self.boxes[4] = 0
        self.sums = np.zeros((5, steps * groups))  # of weighted coordinates, and of the weights
        self.used = np.zeros(groups, np.int64)
        self._memory = np.empty((3, steps * groups))

    def nearest(self, boxes_4G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(G,) the cluster with the highest IoU with each group's box, the earliest of equals, and that IoU (<= 0 if
        none)."""
        width = boxes_4G.shape[1]
        used = max(1, int(self.used[:width].max()))
        x0, y0, x1, y1, areas = self.boxes[:, :used, :width]
        wide, high, rest = (m[: used * width].reshape(used, width) for m in self._memory)
        np.minimum(x1, boxes_4G[2], out=wide)
        wide -= np.maximum(x0, boxes_4G[0], out=rest)
        np.maximum(wide, 0, out=wide)
        np.minimum(y1, boxes_4G[3], out=high)
        high -= np.maximum(y0, boxes_4G[1], out=rest)
        wide *= high
        np.add(areas, _area(boxes_4G), out=rest)
        rest -= wide
        wide /= rest
        best = wide.argmax(0)
        return best, wide[best, np.arange(width)]

    def fuse(self, cluster: np.ndarray, weighted_5G: np.ndarray) -> None:
        """Add a box to a cluster of each group and update the cluster's weighted mean."""
        cells = cluster * self.boxes.shape[2] + np.arange(len(cluster))
        sums = np.take(self.sums, cells, axis=1)
        sums += weighted_5G
        self.sums[:, cells] = sums
        sums /= sums[4]
        self.put(cells, sums[:4])

    def put(self, cells: np.ndarray, boxes_4G: np.ndarray) -> None:
        """Set the boxes that represent these clusters, given as flat indices into (C, G)."""
        flat = self.boxes.reshape(5, -1)
        flat[:4, cells] = boxes_4G
        flat[4, cells] = _area(boxes_4G)


def _area(boxes_4G: np.ndarray) -> np.ndarray:
    return (boxes_4G[2] - boxes_4G[0]) * (boxes_4G[3] - boxes_4G[1])
