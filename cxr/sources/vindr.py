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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN
from cxr.sources import rater_agreement, vinbigdata
from cxr.sources.annotations import CLASS_NAME, IMAGE, READER, Read, read
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_files import PATH, image_ids, image_key, list_images
from cxr.sources.label_rows import listed_keys, word_key
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
    listed = {part: read.images for part, read in parts.items()}
    if not any(listed.values()):
        raise UserError(f"expected {' or '.join(BOXES_FILES)} in {uri}, got neither: add one, or use --source folder")
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    names = [image_key(path) for path in paths.to_pylist()]
    ids, id_notes = image_ids(paths, pa.array(names, pa.string()))
    own = [_part_of(path, image, listed) for path, image in zip(paths.to_pylist(), names, strict=True)]
    images = [(parts.get(part or "", _Part()), image) for part, image in zip(own, names, strict=True)]
    findings = (*LOCAL, *GLOBAL) if any(part.labeled.labels for part in parts.values()) else LOCAL
    labels = [part.labels_of(image)[: len(findings)] for part, image in images]
    boxes = [part.boxes_of(image) for part, image in images]
    frames = vinbigdata.original_px(uri)
    for part in parts.values():
        frames |= part.drawn.frames_px if part.drawn else {}
    in_test, in_train = (np.array([part == each for part in own]) for each in (TEST, TRAIN))
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: pa.array(names, pa.string()),
        schema.SPLIT: split_by_patient(pa.array(names, pa.string()), in_test, in_train),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.array(labels, np.int8)),
        schema.BOXES: pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type),
        schema.BOXES_FRAME: pa.array([frames.get(image) for image in names], pa.list_(pa.int32(), 2)),
        schema.EXTRA: pa.array([part.extra(image) for part, image in images], pa.string()),
    }
    notes += [
        *id_notes,
        *(note for part in parts.values() for note in part.notes),
        *_presence_notes({*names}, set().union(*listed.values())),
    ]
    notes += vinbigdata.size_notes(paths.to_pylist(), names, boxes, frames)
    return Manifest(manifest_table(columns), findings, notes)


@dataclass(frozen=True)
class _ImageLabels:
    """A list of image labels, by image."""

    labels: Mapping[str, np.ndarray] = field(default_factory=dict)  # int8, all findings
    readers: Mapping[str, Sequence[str]] = field(default_factory=dict)  # who gave them, if named
    seen: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)  # who marked it, by finding
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Part:
    """The lists of the training or the test split; empty without arguments."""

    drawn: Read | None = None
    labeled: _ImageLabels = field(default_factory=_ImageLabels)

    @property
    def images(self) -> set[str]:
        return {*self.labeled.labels, *(self.drawn.boxes if self.drawn else ())}

    @property
    def notes(self) -> list[str]:
        return [*(self.drawn.notes if self.drawn else ()), *self.labeled.notes]

    def boxes_of(self, image: str) -> list[dict[str, Any]] | None:
        return self.drawn.boxes.get(image) if self.drawn else None

    def labels_of(self, image: str) -> np.ndarray:
        """int8 (findings,): the labels of an image from boxes and image labels."""
        labels = np.full((2, len(LOCAL) + len(GLOBAL)), UNKNOWN, np.int8)
        if self.drawn:
            labels[0, : len(LOCAL)] = self.drawn.labels([image])[0]
        labels[1] = self.labeled.labels.get(image, UNKNOWN)
        return _either(labels)

    def extra(self, image: str) -> str | None:
        """JSON with all readers and, by finding, those who gave the image that label; None if no reader is named."""
        box_readers = self.drawn.readers.get(image, ()) if self.drawn else ()
        readers = list(dict.fromkeys([*box_readers, *self.labeled.readers.get(image, ())]))
        seen = self.labeled.seen.get(image, {})
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


def _part_of(path: str, image: str, listed: Mapping[str, set[str]]) -> str | None:
    """The split whose lists contain an image, else the one in whose folder it is; None for neither."""
    parts = (TEST, TRAIN)  # an image in both lists is a test image
    named = next((part for part in parts if image in listed[part]), None)
    return named or next((part for part in parts if part in path.split("/")[:-1]), None)


def _read_image_labels(location: str) -> _ImageLabels:
    """A finding is positive if a reader gave the image that label, else negative if a reader denied it, else unknown.

    Contradictory labels of a reader, and findings together with "No finding", are ignored.
    """
    table = read_csv(location, (IMAGE,))
    names = [_ALIASES.get(word_key(column), word_key(column)) for column in table.header]
    words = [word_key(word) for word in (*LOCAL, *GLOBAL, schema.NO_FINDING)]
    positions = [names.index(word) if word in names else None for word in words]
    who = table.column(READER) if READER in table else [""] * len(table)
    rows: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    contradicting: set[tuple[str, str]] = set()  # (image, reader) pairs
    for row, (image, reader, values) in enumerate(
        zip(listed_keys(table, IMAGE).to_pylist(), who, table.rows, strict=True)
    ):
        fields = ["" if position is None else values[position] for position in positions]
        if invalid := next((value for value in fields if value not in _VALUES), None):
            raise table.error(row, "labels of 0, 1 or blank", invalid)
        *of_findings, normal = (_VALUES[value] for value in fields)
        labels = np.array(of_findings, np.int8)
        if normal == POSITIVE:
            contradicting |= {(image, reader)} if (labels == POSITIVE).any() else set()
            labels = np.where(labels == POSITIVE, UNKNOWN, NEGATIVE)
        rows[image][reader].append(labels)
    votes = {image: {who: _merge_rows(np.stack(of)) for who, of in own.items()} for image, own in rows.items()}
    contradicting |= {
        (i, who) for i, own in rows.items() for who, of in own.items() if _contradictory(np.stack(of)).any()
    }
    count, file = len(contradicting), storage.name(location)
    return _ImageLabels(
        labels={image: _either(np.stack([*own.values()])) for image, own in votes.items()},
        readers={image: [reader for reader in own if reader] for image, own in votes.items()},
        seen={image: _readers_by_finding(own) for image, own in votes.items()},
        notes=[f"contradictory readings in {file}: {count:,}; such labels are ignored"] if count else [],
    )


def _contradictory(rows_RF: np.ndarray) -> np.ndarray:
    return (rows_RF == POSITIVE).any(0) & (rows_RF == NEGATIVE).any(0)


def _merge_rows(rows_RF: np.ndarray) -> np.ndarray:
    """Merge one reader's rows of an image; unknown where they contradict each other."""
    return np.where(_contradictory(rows_RF), UNKNOWN, _either(rows_RF)).astype(np.int8)


def _either(rows_RF: np.ndarray) -> np.ndarray:
    """int8 (F,): positive if any row is, else negative if any row is, else unknown."""
    any_positive, any_negative = (rows_RF == POSITIVE).any(0), (rows_RF == NEGATIVE).any(0)
    return np.select([any_positive, any_negative], [POSITIVE, NEGATIVE], UNKNOWN).astype(np.int8)


def _readers_by_finding(votes: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """The named readers who marked each finding."""
    seen: dict[str, list[str]] = {}
    for reader, labels_F in votes.items():
        for number in np.flatnonzero(labels_F == POSITIVE).tolist() if reader else ():
            seen.setdefault((*LOCAL, *GLOBAL)[number], []).append(reader)
    return seen


def _presence_notes(here: set[str], listed: set[str]) -> Iterator[str]:
    """Notes on listed images without a file and on images that are not listed."""
    if missing := len(listed - here):
        yield f"missing from the archive: {missing:,} of {counted(len(listed), 'listed image')}"
    if unlisted := len(here - listed):
        yield f"not in any list, so findings are unknown: {counted(unlisted, 'image')}"
