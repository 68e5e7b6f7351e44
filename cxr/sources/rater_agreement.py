"""Several readers' boxes of one image: how far they agree, made one, and the labels that follow from them.

Everything here works on the boxes of one image as arrays: boxes_N4 (x_min, y_min, x_max, y_max in pixels), label_N
(numbers of findings) and reader_N (whoever drew each box), with N boxes of all readers together. What is made of them
has as its scores the share of readers who drew it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cxr import schema
from cxr.boxes import ScoredBoxes, iou
from cxr.boxes import wbf as fuse

IOU = 0.4  # at which two boxes show the same: VinBigData's own threshold
CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)

READERS, IMAGE_LABELS = "readers", "image_labels"  # in `schema.EXTRA`: who looked; by finding, who saw it
T = TypeVar("T")

Box = Mapping[str, Any]  # of schema.BOX_TYPE
Fusion = Callable[[np.ndarray, np.ndarray, np.ndarray, int], ScoredBoxes]


def union(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """All boxes as they were drawn.

    Args:
        readers: how many looked at the image, those who drew nothing included.
    """
    return ScoredBoxes(_boxes(boxes_N4), np.full(len(label_N), 1 / max(1, readers)), np.asarray(label_N, np.int64))


def majority(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """The mean of the boxes that more than half of the readers agree on, at `IOU`; `readers` as in `union`."""
    found = wbf(boxes_N4, label_N, reader_N, readers)
    kept = found.scores > 0.5
    return ScoredBoxes(found.boxes[kept], found.scores[kept], found.labels[kept])


def wbf(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """The mean of each group of boxes that show the same finding at the same place; `readers` as in `union`.

    Weighted boxes fusion (Solovyev et al. 2021) at `IOU` where all scores are 1. A share counts readers, not boxes:
    who drew two of a group counts once.
    """
    boxes, labels, who = _boxes(boxes_N4), np.asarray(label_N, np.int64), np.asarray(reader_N)
    side = boxes.max(initial=1.0)
    drawn = [_found(boxes[who == each] / side, labels[who == each]) for each in np.unique(who)]
    drawn += [ScoredBoxes.empty()] * (max(1, readers) - len(drawn))
    (fused,) = fuse([drawn], iou_thr=IOU, conf_type="box_and_model_avg")
    return fused._replace(boxes=fused.boxes * side)


def _found(boxes_N4: np.ndarray, label_N: np.ndarray) -> ScoredBoxes:
    return ScoredBoxes(boxes_N4, np.ones(len(boxes_N4)), label_N)


ReaderBoxes = Literal["wbf", "majority", "union"]
FUSIONS: dict[ReaderBoxes, Fusion] = {"union": union, "majority": majority, "wbf": wbf}


def _boxes(boxes: ArrayLike) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


# ---- From rows of a manifest


def arrays(boxes: Sequence[Box], findings: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """boxes_N4, label_N and reader_N of a row's boxes; those of other findings are left out."""
    known = [box for box in boxes if box[schema.LABEL] in findings]
    return (
        _boxes([[box[corner] for corner in CORNERS] for box in known]),
        np.array([findings.index(box[schema.LABEL]) for box in known], np.int64),
        np.array([box[schema.READER] or "" for box in known], str),
    )


def labels(rows: Iterable[Sequence[Box] | None], findings: Sequence[str]) -> np.ndarray:
    """int8 (N, findings): positive where somebody drew a box; unknown where the boxes are null."""
    shown = [None if boxes is None else {box[schema.LABEL] for box in boxes} for boxes in rows]
    found = [
        [schema.UNKNOWN if of_image is None else int(finding in of_image) for finding in findings]
        for of_image in shown
    ]
    return np.array(found, np.int8).reshape(-1, len(findings))


def agreed(
    labels_NF: np.ndarray,
    rows: Sequence[Sequence[Box] | None],
    extras: Sequence[str | None],
    findings: Sequence[str],
    agree: int,
) -> np.ndarray:
    """Labels in which a finding stays positive only if `agree` readers saw it; others than positive ones stay.

    A reader saw a finding who drew a box of it, or whom `IMAGE_LABELS` in the image's `schema.EXTRA` names. Images
    without named readers, such as those of a consensus, stay as they are.
    """
    made = labels_NF.copy()
    for labels_F, boxes, extra in zip(made, rows, extras, strict=True):
        if not _looked(boxes, extra):
            continue
        seen = {(box[schema.LABEL], box[schema.READER]) for box in boxes or ()}
        seen |= {(finding, who) for finding, named in _told(extra, IMAGE_LABELS, {}).items() for who in named}
        votes = Counter(finding for finding, _ in seen)
        too_few = np.array([votes[finding] < agree for finding in findings], bool)
        labels_F[(labels_F == schema.POSITIVE) & too_few] = schema.NEGATIVE
    return made


def one_set(
    rows: Sequence[Sequence[Box] | None], extras: Sequence[str | None], how: ReaderBoxes
) -> tuple[list[Sequence[Box] | None], np.ndarray]:
    """Boxes (of schema.BOX_TYPE) as one reader's, where several named ones looked at an image; as they are elsewhere.

    Also (N,) how many named readers looked.

    Args:
        extras: `schema.EXTRA` of the images, whose `READERS` also names those who drew nothing.
        how: a name of `FUSIONS`.
    """
    looked = [_looked(boxes, extra) for boxes, extra in zip(rows, extras, strict=True)]
    findings = sorted({box[schema.LABEL] for boxes in rows for box in boxes or ()})
    made = [
        _fused(boxes, findings, how, count) if count > 1 and _drawn_by_readers(boxes) else boxes
        for boxes, count in zip(rows, looked, strict=True)
    ]
    return made, np.array(looked, int)


def _drawn_by_readers(boxes: Sequence[Box] | None) -> TypeGuard[Sequence[Box]]:
    """Whether these are still each reader's own boxes; shards hold one set, of no reader."""
    return any(box[schema.READER] for box in boxes or ())


def _looked(boxes: Sequence[Box] | None, extra: str | None) -> int:
    """How many looked at an image, as far as they are named: those who drew, or whom the source lists."""
    drew = {box[schema.READER] for box in boxes or ()} - {None}
    return len(drew | set(_told(extra, READERS, [])))


def _told(extra: str | None, name: str, default: T) -> T:
    """What an image's `schema.EXTRA` has under a name; the default where it has nothing of that type."""
    value = json.loads(extra).get(name) if extra else None
    return value if isinstance(value, type(default)) else default


def _fused(boxes: Sequence[Box], findings: Sequence[str], how: ReaderBoxes, count: int) -> list[Box]:
    made = FUSIONS[how](*arrays(boxes, findings), count)
    return [
        {schema.LABEL: findings[label], schema.READER: None, **dict(zip(CORNERS, box, strict=True))}
        for box, label in zip(made.boxes.tolist(), made.labels.tolist(), strict=True)
    ]


# ---- How far readers agree


def pair_f1(images: Iterable[tuple[Sequence[Box], Sequence[str]]], findings: Sequence[str]) -> np.ndarray:
    """(findings,) F1 of one reader's boxes against another's: 2 x matches / boxes of both, over all pairs of readers.

    Within a finding boxes are matched one to one, best overlap first, above `IOU`. NaN where nobody drew a box.

    Args:
        images: each one's boxes, and the readers who looked at it.
    """
    matched, drawn = np.zeros(len(findings)), np.zeros(len(findings))
    for boxes, readers in images:
        by_reader = _by_finding(boxes, findings)
        for one, other in combinations(readers, 2):
            for number in by_reader[one].keys() | by_reader[other].keys():
                a, b = (_boxes(by_reader[each].get(number, [])) for each in (one, other))
                matched[number] += sum(1 for _ in matches(a, b))
                drawn[number] += len(a) + len(b)
    return np.divide(2 * matched, drawn, out=np.full(len(findings), np.nan), where=drawn > 0)


def matches(a_N4: np.ndarray, b_M4: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of boxes that overlap by more than `IOU`, each box in one pair at most, best overlap first."""
    overlap = iou(a_N4, b_M4)
    while overlap.size and overlap.max() > IOU:
        one, other = np.unravel_index(int(overlap.argmax()), overlap.shape)
        yield int(one), int(other)
        overlap[one, :] = overlap[:, other] = 0


def _by_finding(boxes: Sequence[Box], findings: Sequence[str]) -> Mapping[str, dict[int, list[list[float]]]]:
    by_reader: dict[str, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for box in boxes:
        number = findings.index(box[schema.LABEL])
        by_reader[box[schema.READER]][number].append([box[corner] for corner in CORNERS])
    return by_reader
