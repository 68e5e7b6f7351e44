"""What readers drew, in VinBigData's columns (Nguyen et al. 2022), as one file beside or apart from the images.

    image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max

A row is a box that a reader drew, or, with class 14 and no corners, a reader who found nothing. Corners are pixels of
the frame in which the images' source gives its boxes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import readers
from cxr.sources.base import Manifest, labels_column
from cxr.sources.csv_table import read_csv
from cxr.sources.listing import image_key
from cxr.sources.readers import ReaderBoxes

IMAGE, CLASS, READER = "image_id", "class_id", "rad_id"
CLASS_NAME = "class_name"
HEADER = (IMAGE, CLASS_NAME, CLASS, READER, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
NO_FINDING, NO_FINDING_ID = "No finding", len(schema.VINBIGDATA_FINDINGS)
_FINDINGS = {str(number): finding for number, finding in enumerate(schema.VINBIGDATA_FINDINGS)}
_NEEDED = (IMAGE, CLASS, READER, *readers.CORNERS)

Boxes = list[dict[str, Any]]  # of schema.BOX_TYPE


@dataclass(frozen=True)
class Labelling:
    """Where an archive's labels and boxes come from, other than from its source."""

    annotations: str = ""
    """URI of a CSV file in VinBigData's columns: its labels and boxes take the place of the archive's own, and images
    that it does not name are left out; empty: none."""
    readers_agree: int = 1
    """Readers who must have drawn a finding for its label to be positive, where the boxes are of several."""
    reader_boxes: ReaderBoxes = "wbf"
    """Where several readers drew boxes of an image. wbf: those of one finding that overlap become one; majority: of
    these, those that more than half of the readers drew; union: all, as they are."""

    def __post_init__(self) -> None:
        if self.readers_agree < 1:
            raise UserError(f"readers_agree={self.readers_agree}: wanted 1 or more readers")

    def __bool__(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.describe())

    def check_raw(self, archive: str) -> None:
        """Raise UserError where it asks for something, of shards."""
        if self:
            given = ", ".join("--" + name.replace("_", "-") for name in self.describe())
            raise UserError(
                f"{archive} is shards, which hold the labels that they were made with: leave {given} out, or give "
                f"the archive itself"
            )

    def describe(self) -> dict[str, Any]:
        """What differs from the source's own labels; empty where nothing does."""
        asked = {"annotations": storage.normalise(self.annotations)} if self.annotations else {}
        asked |= {"readers_agree": self.readers_agree} if self.readers_agree > 1 else {}
        return asked | ({"reader_boxes": self.reader_boxes} if self.reader_boxes != "wbf" else {})


@dataclass(frozen=True)
class Read:
    """A file's contents by image id, in the file's order: all boxes, none where nobody drew one; and who looked."""

    boxes: Mapping[str, Boxes]
    readers: Mapping[str, Sequence[str]]
    notes: Sequence[str]


def read(location: str) -> Read:
    """Read such a file.

    Raises:
        UserError: it is not such a file, or a row is not understood; the message names the row.
    """
    table = read_csv(location, _NEEDED)
    columns = [table.column(name) for name in _NEEDED]
    boxes: dict[str, Boxes] = {}
    looked: dict[str, dict[str, None]] = defaultdict(dict)
    flat = 0
    for row, (image, of_class, reader, *corners) in enumerate(zip(*columns, strict=True)):
        drawn = boxes.setdefault(image_key(image), [])
        looked[image_key(image)][reader] = None
        try:
            box = _box(of_class, reader, corners)
        except ValueError as error:
            raise UserError(f"{location}, line {table.lines[row]}: {error}; mend the line") from None
        if box and (box[schema.X_MAX] <= box[schema.X_MIN] or box[schema.Y_MAX] <= box[schema.Y_MIN]):
            flat += 1
        elif box:
            drawn.append(box)
    notes = [f"{flat:,} boxes of {storage.name(location)} have no area: they are left out"] if flat else []
    return Read(boxes, {image: tuple(who) for image, who in looked.items()}, notes)


def _box(of_class: str, reader: str, corners: Sequence[str]) -> dict[str, Any] | None:
    """None for a reader who found nothing."""
    if of_class == str(NO_FINDING_ID):
        return None
    if of_class not in _FINDINGS:
        raise ValueError(f"class_id {of_class!r}, wanted 0 to {NO_FINDING_ID}")
    numbers = [float(corner) for corner in corners]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"corners {', '.join(corners)}")
    box = dict(zip(readers.CORNERS, numbers, strict=True))
    return {schema.LABEL: _FINDINGS[of_class], schema.READER: reader, **box}


def labelled(manifest: Manifest, labelling: Labelling) -> Manifest:
    """The manifest with labels and boxes as asked for; the one given where nothing is.

    With annotations only the images stay that these name; files, patients and splits stay as the source has them.

    Raises:
        UserError: annotations that name none of the images, or boxes without readers who could agree.
    """
    if labelling.annotations:
        manifest = _annotated(manifest, storage.normalise(labelling.annotations))
    return _agreed(manifest, labelling.readers_agree) if labelling.readers_agree > 1 else manifest


def one_reader(manifest: Manifest, how: ReaderBoxes) -> Manifest:
    """The manifest with one set of boxes an image, where several readers drew theirs."""
    table = manifest.table
    made, looked = readers.one_set(table[schema.BOXES].to_pylist(), table[schema.EXTRA].to_pylist(), how)
    several = int((looked > 1).sum())
    if not several:
        return manifest
    notes = [*manifest.notes, f"boxes of several readers in {several:,} images: one set by {how}"]
    boxes = pa.array(made, schema.MANIFEST.field(schema.BOXES).type)
    return Manifest(_replaced(table, schema.BOXES, boxes), manifest.findings, notes)


def _annotated(manifest: Manifest, location: str) -> Manifest:
    told, stems = read(location), [image_key(image_id) for image_id in manifest.table[schema.IMAGE_ID].to_pylist()]
    named = [each for each in stems if each in told.boxes]
    file, images = storage.name(location), f"{len(told.boxes):,} images that {storage.name(location)} names"
    if not named:
        raise UserError(f"{location} names none of the {len(stems):,} images: give the annotations of this archive")
    table = manifest.table.filter(pa.array([each in told.boxes for each in stems]))
    boxes = [told.boxes[each] for each in named]
    findings = schema.VINBIGDATA_FINDINGS
    table = _replaced(table, schema.BOXES, pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type))
    table = _replaced(table, schema.LABELS, labels_column(readers.labels(boxes, findings)))
    notes = [*manifest.notes, *told.notes, f"labels and boxes of {len(named):,} of {len(stems):,} images: {file}"]
    if missing := len(told.boxes.keys() - set(named)):
        notes.append(f"{missing:,} of the {images} are not here")
    return Manifest(table, findings, notes)


def _agreed(manifest: Manifest, agree: int) -> Manifest:
    """Labels by the number of readers who drew a box."""
    boxes = manifest.table[schema.BOXES].to_pylist()
    if not any(box[schema.READER] for of_image in boxes for box in of_image or ()):
        raise UserError(f"readers_agree={agree}: these boxes are of no named readers. Leave it out")
    labels = labels_column(readers.labels(boxes, manifest.findings, agree))
    note = f"a finding counts as there where {agree} readers have drawn it"
    return Manifest(_replaced(manifest.table, schema.LABELS, labels), manifest.findings, [*manifest.notes, note])


def _replaced(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), values)
