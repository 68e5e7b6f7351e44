"""Agreement between readers (radiologists) who drew boxes on the same images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from cxr import schema
from cxr.boxes import iou
from cxr.sources.rater_agreement import CORNERS, IOU, Box


def pair_f1(images: Iterable[tuple[Sequence[Box], Sequence[str]]], findings: Sequence[str]) -> np.ndarray:
    """(findings,) F1 between two readers' boxes, 2 x matches / boxes of both, pooled over all pairs of readers.

    Boxes of a finding are matched one to one in order of decreasing IoU, above `IOU`. NaN if there are no boxes.

    Args:
        images: boxes and readers of each image.
    """
    matched, boxes_of_both = np.zeros(len(findings)), np.zeros(len(findings))
    for boxes, readers in images:
        by_reader = _by_finding(boxes, findings)
        for first, second in combinations(readers, 2):
            for number in by_reader[first].keys() | by_reader[second].keys():
                a, b = (np.array(by_reader[each].get(number, [])).reshape(-1, 4) for each in (first, second))
                matched[number] += sum(1 for _ in matches(a, b))
                boxes_of_both[number] += len(a) + len(b)
    return np.divide(2 * matched, boxes_of_both, out=np.full(len(findings), np.nan), where=boxes_of_both > 0)


def matches(a_N4: np.ndarray, b_M4: np.ndarray) -> Iterator[tuple[int, int]]:
    """One-to-one pairs of boxes with an IoU above `IOU`, in order of decreasing IoU."""
    overlap = iou(a_N4, b_M4)
    while overlap.size and overlap.max() > IOU:
        first, second = np.unravel_index(int(overlap.argmax()), overlap.shape)
        yield int(first), int(second)
        overlap[first, :] = overlap[:, second] = 0


def _by_finding(boxes: Sequence[Box], findings: Sequence[str]) -> Mapping[str, dict[int, list[list[float]]]]:
    by_reader: dict[str, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for box in boxes:
        number = findings.index(box[schema.LABEL])
        by_reader[box[schema.READER]][number].append([box[corner] for corner in CORNERS])
    return by_reader
