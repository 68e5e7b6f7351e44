"""VinDr-CXR as published on PhysioNet (Nguyen et al. 2022): 18,000 DICOM files, official splits, image labels.

    annotations/annotations_train.csv    image_id, rad_id, class_name, x_min, y_min, x_max, y_max: three readers each
    annotations/annotations_test.csv     the same without rad_id: the consensus of five
    annotations/image_labels_train.csv   image_id, rad_id, and a column of 0 and 1 for each of 28 labels
    annotations/image_labels_test.csv    the same without rad_id
    train/IMAGE_ID.dicom, test/IMAGE_ID.dicom

The lists may also be in the archive's root, and some may be missing. A finding is positive if a reader drew a box of
it or if an image label says so, negative if it is denied, and unknown otherwise. Global findings are diagnoses
without boxes, which appear only as image labels. The test split consists of the images in the test lists or in the
folder test; the others are for training and validation. PNG and JPEG copies need the size of the originals, from the
same files as for VinBigData (`sources.vinbigdata`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN
from cxr.sources import rater_agreement, vinbigdata
from cxr.sources.annotations import (
    BOXES_TYPE,
    CLASS_NAME,
    IMAGE,
    READER,
    Read,
    frames_of,
    joined_frames,
    numbered,
    read,
)
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_files import PATH, image_ids, image_keys, list_images
from cxr.sources.image_table import by_text
from cxr.sources.label_rows import numbered_images, word_key
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "vindr-cxr"

TRAIN, TEST = PARTS = ("train", "test")  # image folders and official splits
BOXES_FILES = ("annotations_train.csv", "annotations_test.csv")
LABELS_FILES = ("image_labels_train.csv", "image_labels_test.csv")
FOLDER = "annotations"
LOCAL, GLOBAL = schema.VINDR_LOCAL_FINDINGS, schema.VINDR_GLOBAL_FINDINGS
_ALIASES = {"otherdiseases": "otherdisease"}  # spelling in image_labels_train.csv
_CHUNK = 65_536  # images whose readers are Python objects at a time
_VALUES = {"0": NEGATIVE, "0.0": NEGATIVE, "1": POSITIVE, "1.0": POSITIVE, "": UNKNOWN}


def detect(uri: str) -> bool:
    needed = {BOXES_FILES: (IMAGE, CLASS_NAME, *rater_agreement.CORNERS), LABELS_FILES: (IMAGE, schema.NO_FINDING)}
    lists = ((_location(uri, file), columns) for files, columns in needed.items() for file in files)
    return any(location is not None and has_columns(location, columns) for location, columns in lists)


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the lists; notes count missing and unlisted images.

    Raises:
        UserError: there is no list, a list is damaged, or there are no images.
    """
    lists = zip(PARTS, BOXES_FILES, LABELS_FILES, strict=True)
    parts = {part: _read_part(_location(uri, drawn), _location(uri, labeled)) for part, drawn, labeled in lists}
    listed = pa.concat_arrays([part.images for part in parts.values()]).unique()
    if not len(listed):
        raise UserError(f"expected {' or '.join(BOXES_FILES)} in {uri}, got neither: add one, or use --source folder")
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    names = image_keys(paths)
    ids, id_notes = image_ids(paths, names)
    in_test = pc.is_in(names, value_set=parts[TEST].images).to_numpy(zero_copy_only=False)  # also if in both lists
    in_train = pc.is_in(names, value_set=parts[TRAIN].images).to_numpy(zero_copy_only=False) & ~in_test
    for part, chosen in ((TEST, in_test), (TRAIN, in_train)):
        in_folder = pc.match_substring_regex(paths, rf"(^|/){part}/").to_numpy(zero_copy_only=False)
        chosen |= in_folder & ~in_test & ~in_train
    has_labels = any(len(part.labeled.images) for part in parts.values())
    findings = (*LOCAL, *GLOBAL) if has_labels else LOCAL
    own = np.select([in_train, in_test], [0, 1], -1)  # which of the parts; −1: neither
    of_parts = [
        part.of_images(pc.if_else(pa.array(own == number), names, None)) for number, part in enumerate(parts.values())
    ]
    boxes, extra = (
        pc.coalesce(*columns) for columns in zip(*((each.boxes, each.extra) for each in of_parts), strict=True)
    )
    labels = np.select([(own == number)[:, None] for number in (0, 1)], [each.labels for each in of_parts], UNKNOWN)
    drawn_frames = [part.drawn.sizes for part in (parts[TEST], parts[TRAIN]) if part.drawn]
    frames = frames_of(joined_frames([*drawn_frames, vinbigdata.original_px(uri)]), names)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: names,
        schema.SPLIT: split_by_patient(names, in_test, in_train),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.ascontiguousarray(labels[:, : len(findings)], np.int8)),
        schema.BOXES: boxes,
        schema.BOXES_FRAME: frames,
        schema.EXTRA: extra,
    }
    notes += [
        *id_notes,
        *(note for part in parts.values() for note in part.notes),
        *_presence_notes(names.unique(), listed),
    ]
    notes += vinbigdata.size_notes(paths, boxes, frames)
    return Manifest(manifest_table(columns), findings, notes)


@dataclass(frozen=True)
class _ImageLabels:
    """A list of image labels: readings, each what a reader said about an image, together by image."""

    images: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    labels: np.ndarray = field(default_factory=lambda: np.empty((0, len(LOCAL) + len(GLOBAL)), np.int8))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """(N + 1,): the readings of image n are those from ends[n] to ends[n + 1]."""
    readers: Sequence[str] = ()
    """Of each reading; blank if not named."""
    votes: np.ndarray = field(default_factory=lambda: np.empty((0, len(LOCAL) + len(GLOBAL)), np.int8))
    notes: Sequence[str] = ()

    def named(self, row: int) -> dict[str, np.ndarray]:
        """The named readers of an image, and the labels that they gave it."""
        readings = range(self.ends[row], self.ends[row + 1])
        return {self.readers[each]: self.votes[each] for each in readings if self.readers[each]}


@dataclass(frozen=True)
class _OfImages:
    """What a part's lists say about images."""

    boxes: pa.Array
    labels: np.ndarray
    extra: pa.Array


@dataclass(frozen=True)
class _Part:
    """The lists of the training or the test split."""

    drawn: Read | None
    labeled: _ImageLabels

    @property
    def images(self) -> pa.Array:
        drawn = [self.drawn.images] if self.drawn else []
        return pa.concat_arrays([*drawn, self.labeled.images])

    @property
    def notes(self) -> list[str]:
        return [*(self.drawn.notes if self.drawn else ()), *self.labeled.notes]

    def of_images(self, images: pa.Array) -> _OfImages:
        """Boxes, labels from boxes and image labels, and readers; of null, nothing is known."""
        both_2NF = np.full((2, len(images), len(LOCAL) + len(GLOBAL)), UNKNOWN, np.int8)
        boxes, drew = pa.nulls(len(images), BOXES_TYPE), pa.nulls(len(images), pa.list_(pa.string()))
        if self.drawn:
            both_2NF[0, :, : len(LOCAL)] = self.drawn.labels_of(images)
            row = self.drawn.rows_of(images)
            boxes, drew = self.drawn.boxes.take(row), self.drawn.readers.take(row)
        row = pc.fill_null(pc.index_in(images, value_set=self.labeled.images), -1).to_numpy()
        both_2NF[1, row >= 0] = self.labeled.labels[row[row >= 0]]
        labeled = (self.labeled.named(each) if each >= 0 else {} for each in row.tolist())
        chunks = (drew.slice(start, _CHUNK).to_pylist() for start in range(0, len(drew), _CHUNK))
        named = zip((readers or () for chunk in chunks for readers in chunk), labeled, strict=True)
        return _OfImages(boxes, _either(both_2NF), pa.array((_extra(*each) for each in named), pa.string()))


def _extra(drew: Sequence[str], labeled: Mapping[str, np.ndarray]) -> str | None:
    """JSON with all readers and, by finding, those who gave an image that label; None if no reader is named."""
    readers = list(dict.fromkeys([*drew, *labeled]))
    seen: dict[str, list[str]] = {}
    for reader, labels_F in labeled.items():
        for number in np.flatnonzero(labels_F == POSITIVE).tolist():
            seen.setdefault((*LOCAL, *GLOBAL)[number], []).append(reader)
    return json.dumps({rater_agreement.READERS: readers, rater_agreement.IMAGE_LABELS: seen}) if readers else None


def _location(uri: str, file: str) -> str | None:
    """The location of a list: the archive's root or `FOLDER`; None if it is missing."""
    candidates = (storage.join(uri, file), storage.join(uri, FOLDER, file))
    return next((location for location in candidates if storage.exists(location)), None)


def _read_part(drawn: str | None, labeled: str | None) -> _Part:
    """Read the lists of a split; a missing list is empty."""
    return _Part(
        read(drawn, "vindr") if drawn else None,
        _read_image_labels(labeled) if labeled else _ImageLabels(),
    )


def _read_image_labels(location: str) -> _ImageLabels:
    """A finding is positive if a reader gave the image that label, else negative if a reader denied it, else unknown.

    Contradictory labels of a reader, and findings together with "No finding", are ignored.
    """
    table = read_csv(location, (IMAGE,))
    names = [_ALIASES.get(word_key(column), word_key(column)) for column in table.header]
    words = [word_key(word) for word in (*LOCAL, *GLOBAL, schema.NO_FINDING)]
    labels_MF = np.full((len(table), len(words)), UNKNOWN, np.int8)
    invalid: list[tuple[int, int]] = []  # the first row of each column that is not a label, and the column
    for number, word in enumerate(words):
        if word in names:
            values_M = by_text(table.texts(names.index(word)), lambda text: _VALUES.get(text, np.nan))
            wrong_M = np.isnan(values_M)
            invalid += [(int(wrong_M.argmax()), number)] if wrong_M.any() else []
            labels_MF[:, number] = np.where(wrong_M, UNKNOWN, values_M)
    image_M, images = numbered_images(table, IMAGE)
    if invalid:
        row, number = min(invalid)
        raise table.error(row, "labels of 0, 1 or blank", table.texts(names.index(words[number]))[row].as_py())
    normal_M, labels_MF = labels_MF[:, -1] == POSITIVE, labels_MF[:, :-1]
    found_MF = labels_MF == POSITIVE
    contradicting_M = normal_M & found_MF.any(1)
    labels_MF[normal_M] = np.where(found_MF[normal_M], UNKNOWN, NEGATIVE)

    reader_M, readers = numbered(table.texts(READER) if READER in table else pa.repeat(pa.scalar(""), len(table)))
    pairs, first_V, vote_M = np.unique(
        image_M * max(1, len(readers)) + reader_M, return_index=True, return_inverse=True
    )
    order = np.argsort(vote_M, kind="stable")
    starts = np.searchsorted(vote_M[order], np.arange(len(pairs)))
    positive_VF, negative_VF = _any_of(labels_MF[order], starts)
    contradictory_VF = positive_VF & negative_VF
    votes_VF = np.select([contradictory_VF, positive_VF, negative_VF], [UNKNOWN, POSITIVE, NEGATIVE], UNKNOWN).astype(
        np.int8
    )
    contradictory_V = np.union1d(np.flatnonzero(contradictory_VF.any(1)), vote_M[contradicting_M])

    by_image = np.lexsort((first_V, image_M[first_V]))  # the readings of each image in the file's order
    votes_VF, first_V = votes_VF[by_image], first_V[by_image]
    ends = np.searchsorted(image_M[first_V], np.arange(len(images) + 1))
    positive_NF, negative_NF = _any_of(votes_VF, ends[:-1])
    count, file = len(contradictory_V), storage.name(location)
    return _ImageLabels(
        images=images,
        labels=np.select([positive_NF, negative_NF], [POSITIVE, NEGATIVE], UNKNOWN).astype(np.int8),
        ends=ends,
        readers=readers.take(pa.array(reader_M[first_V])).to_pylist(),
        votes=votes_VF,
        notes=[f"contradictory readings in {file}: {count:,}; such labels are ignored"] if count else [],
    )


def _any_of(labels_MF: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether any label of each run of rows is positive, and whether any is negative; runs begin at `starts`."""
    if not len(labels_MF):
        return np.zeros((0, labels_MF.shape[1]), bool), np.zeros((0, labels_MF.shape[1]), bool)
    positive, negative = (np.logical_or.reduceat(labels_MF == value, starts) for value in (POSITIVE, NEGATIVE))
    return positive, negative


def _either(labels_RNF: np.ndarray) -> np.ndarray:
    """int8 (N, F): positive if any of the R labels is, else negative if any is negative, else unknown."""
    any_positive, any_negative = ((labels_RNF == value).any(0) for value in (POSITIVE, NEGATIVE))
    return np.select([any_positive, any_negative], [POSITIVE, NEGATIVE], UNKNOWN).astype(np.int8)


def _presence_notes(here: pa.Array, listed: pa.Array) -> Iterator[str]:
    """Notes on listed images without a file and on images that are not listed."""
    if missing := len(listed) - pc.sum(pc.is_in(listed, value_set=here)).as_py():
        yield f"missing from the archive: {missing:,} of {counted(len(listed), 'listed image')}"
    if unlisted := len(here) - pc.sum(pc.is_in(here, value_set=listed)).as_py():
        yield f"not in any list, so findings are unknown: {counted(unlisted, 'image')}"
