"""Boxes that several readers (radiologists) drew on an image: fusion, and labels by vote.

The boxes of an image are arrays over all readers: boxes_N4 (x_min, y_min, x_max, y_max in pixels), label_N (finding
numbers) and reader_N (who drew each box). The score of a fused box is the fraction of readers who drew it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from cxr import schema
from cxr.boxes import ScoredBoxes
from cxr.boxes import wbf as fuse
from cxr.sources.options import ReaderBoxes

IOU = 0.4  # boxes with a higher IoU mark the same object; VinBigData's own threshold
CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)

READERS, IMAGE_LABELS = "readers", "image_labels"  # keys in `schema.EXTRA`: readers; readers who marked a finding
T = TypeVar("T")

Box = Mapping[str, Any]  # as schema.BOX_TYPE
Fusion = Callable[[np.ndarray, np.ndarray, np.ndarray, int], ScoredBoxes]


def union(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """All boxes, unchanged.

    Args:
        readers: number of readers of the image, including those who drew nothing.
    """
    return ScoredBoxes(_boxes(boxes_N4), np.full(len(label_N), 1 / max(1, readers)), np.asarray(label_N, np.int64))


def majority(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """Fused boxes that more than half of the readers drew; `readers` as in `union`."""
    fused = wbf(boxes_N4, label_N, reader_N, readers)
    keep = fused.scores > 0.5
    return ScoredBoxes(fused.boxes[keep], fused.scores[keep], fused.labels[keep])


def wbf(boxes_N4: np.ndarray, label_N: np.ndarray, reader_N: np.ndarray, readers: int) -> ScoredBoxes:
    """Weighted boxes fusion (Solovyev et al. 2021) at `IOU` with scores of 1; `readers` as in `union`.

    The score of a fused box counts readers, not boxes: a reader who drew two of its boxes counts once.
    """
    boxes, labels, reader = _boxes(boxes_N4), np.asarray(label_N, np.int64), np.asarray(reader_N)
    side = boxes.max(initial=1.0)
    by_reader = [_with_score_1(boxes[reader == each] / side, labels[reader == each]) for each in np.unique(reader)]
    by_reader += [ScoredBoxes.empty()] * (max(1, readers) - len(by_reader))
    (fused,) = fuse([by_reader], iou_thr=IOU, conf_type="box_and_model_avg")
    return fused._replace(boxes=fused.boxes * side)


def _with_score_1(boxes_N4: np.ndarray, label_N: np.ndarray) -> ScoredBoxes:
    return ScoredBoxes(boxes_N4, np.ones(len(boxes_N4)), label_N)


FUSIONS: dict[ReaderBoxes, Fusion] = {"union": union, "majority": majority, "wbf": wbf}


def _boxes(boxes: ArrayLike) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


# ---- From rows of a manifest


def arrays(boxes: Sequence[Box], findings: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """boxes_N4, label_N and reader_N of a row's boxes; boxes of other findings are dropped."""
    known = [box for box in boxes if box[schema.LABEL] in findings]
    return (
        _boxes([[box[corner] for corner in CORNERS] for box in known]),
        np.array([findings.index(box[schema.LABEL]) for box in known], np.int64),
        np.array([box[schema.READER] or "" for box in known], str),
    )


def labels(rows: Iterable[Sequence[Box] | None], findings: Sequence[str]) -> np.ndarray:
    """int8 (N, findings): positive if any reader drew a box; unknown if the boxes are null."""
    findings_by_image = [None if boxes is None else {box[schema.LABEL] for box in boxes} for boxes in rows]
    values = [
        [schema.UNKNOWN if of_image is None else int(finding in of_image) for finding in findings]
        for of_image in findings_by_image
    ]
    return np.array(values, np.int8).reshape(-1, len(findings))


def agreed(
    labels_NF: np.ndarray,
    rows: Sequence[Sequence[Box] | None],
    extras: Sequence[str | None],
    findings: Sequence[str],
    min_readers: int,
) -> np.ndarray:
    """Make positive labels negative unless at least `min_readers` readers marked the finding; keep other labels.

    A reader marked a finding by drawing a box of it or by being listed under `IMAGE_LABELS` in the image's
    `schema.EXTRA`. Images without named readers, such as those of a consensus, are unchanged.
    """
    result = labels_NF.copy()
    for labels_F, boxes, extra in zip(result, rows, extras, strict=True):
        if not _reader_count(boxes, extra):
            continue
        marked = {(box[schema.LABEL], box[schema.READER]) for box in boxes or ()}
        marked |= {
            (finding, reader)
            for finding, readers in _extra_value(extra, IMAGE_LABELS, {}).items()
            for reader in readers
        }
        votes = Counter(finding for finding, _ in marked)
        too_few = np.array([votes[finding] < min_readers for finding in findings], bool)
        labels_F[(labels_F == schema.POSITIVE) & too_few] = schema.NEGATIVE
    return result


def one_set(
    rows: Sequence[Sequence[Box] | None], extras: Sequence[str | None], how: ReaderBoxes
) -> list[Sequence[Box] | None]:
    """Fuse the boxes (schema.BOX_TYPE) of images with several named readers; others are unchanged.

    Args:
        extras: `schema.EXTRA` of the images, whose `READERS` also lists readers who drew nothing.
        how: a key of `FUSIONS`.
    """
    counts = [_reader_count(boxes, extra) for boxes, extra in zip(rows, extras, strict=True)]
    findings = sorted({box[schema.LABEL] for boxes in rows for box in boxes or ()})
    return [
        _fuse_boxes(boxes, findings, how, count) if count > 1 and _drawn_by_readers(boxes) else boxes
        for boxes, count in zip(rows, counts, strict=True)
    ]


def reader_counts(boxes: pa.ChunkedArray, extras: pa.ChunkedArray) -> np.ndarray:
    """(N,) the number of named readers of each image: `_reader_count` of columns of a manifest."""
    encoded = extras.combine_chunks().dictionary_encode()
    listed = [_extra_value(text, READERS, []) for text in encoded.dictionary.to_pylist()]
    lengths = np.array([*map(len, listed), 0])  # the last one is that of images without an extra
    ends = np.cumsum(lengths)
    text_N = pc.fill_null(encoded.indices, len(listed)).to_numpy()
    images = np.repeat(np.arange(len(text_N)), lengths[text_N])
    within = np.arange(len(images)) - np.repeat(np.cumsum(lengths[text_N]) - lengths[text_N], lengths[text_N])
    names = pa.array([str(reader) for readers in listed for reader in readers], pa.string())
    listed_names = names.take(pa.array((ends - lengths)[text_N][images] + within))

    lists = boxes.combine_chunks()
    drew = pc.struct_field(lists.flatten(), schema.READER)
    named = drew.is_valid()
    images = np.concatenate([images, pc.list_parent_indices(lists).filter(named).to_numpy()])
    readers = pa.concat_arrays([listed_names, drew.filter(named)]).dictionary_encode()
    pairs = np.unique(images * (len(readers.dictionary) + 1) + readers.indices.to_numpy(zero_copy_only=False))
    return np.bincount(pairs // (len(readers.dictionary) + 1), minlength=len(lists))


def _drawn_by_readers(boxes: Sequence[Box] | None) -> TypeGuard[Sequence[Box]]:
    """Whether these are individual readers' boxes; shards contain one fused set without readers."""
    return any(box[schema.READER] for box in boxes or ())


def _reader_count(boxes: Sequence[Box] | None, extra: str | None) -> int:
    """The number of named readers of an image: those who drew boxes and those whom the source lists."""
    drew = {box[schema.READER] for box in boxes or ()} - {None}
    return len(drew | set(_extra_value(extra, READERS, [])))


def _extra_value(extra: str | None, name: str, default: T) -> T:
    """The value of a key in an image's `schema.EXTRA`; the default if it is missing or has another type."""
    value = json.loads(extra).get(name) if extra else None
    return value if isinstance(value, type(default)) else default


def _fuse_boxes(boxes: Sequence[Box], findings: Sequence[str], how: ReaderBoxes, count: int) -> list[Box]:
    fused = FUSIONS[how](*arrays(boxes, findings), count)
    return [
        {schema.LABEL: findings[label], schema.READER: None, **dict(zip(CORNERS, box, strict=True))}
        for box, label in zip(fused.boxes.tolist(), fused.labels.tolist(), strict=True)
    ]
