"""What readers drew, in the columns of VinBigData or VinDr-CXR (Nguyen et al. 2022): beside the images or apart.

    image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
    image_id,rad_id,class_name,x_min,y_min,x_max,y_max

A row is a box that a reader drew, or, with class 14 ("No finding") and no corners, a reader who found nothing. A
consensus has no column rad_id. Corners are pixels of the frame in which the images' source gives its boxes; with the
columns width and height, of an image of that size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement
from cxr.sources.csv_table import CsvTable, read_csv
from cxr.sources.image_files import image_key
from cxr.sources.label_rows import image_keys, unknown_words_note, word_key
from cxr.sources.manifest import Manifest, labels_column
from cxr.sources.rater_agreement import ReaderBoxes

IMAGE, CLASS, READER = "image_id", "class_id", "rad_id"
CLASS_NAME = "class_name"
HEADER = (IMAGE, CLASS_NAME, CLASS, READER, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
FRAME = ("height", "width")  # columns with the size of the image that a row's corners refer to
NO_FINDING, NO_FINDING_ID = "No finding", len(schema.VINBIGDATA_FINDINGS)
_LARGEST_PX = 65_535  # to a side, as DICOM can say it (Rows and Columns are unsigned, of 16 bits)

Boxes = list[dict[str, Any]]  # of schema.BOX_TYPE


@dataclass(frozen=True)
class Labeling:
    """Where an archive's labels and boxes come from, other than from its source."""

    annotations: str = ""
    """URI of a CSV file in VinBigData's or VinDr-CXR's columns. Its labels and boxes replace the archive's own, and
    images that it does not name are left out. Empty: the archive's own."""
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
        asked = {"annotations": storage.normalize(self.annotations)} if self.annotations else {}
        asked |= {"readers_agree": self.readers_agree} if self.readers_agree > 1 else {}
        return asked | ({"reader_boxes": self.reader_boxes} if self.reader_boxes != "wbf" else {})


@dataclass(frozen=True)
class Read:
    """A file's contents by image, as `image_key` names it, in the file's order."""

    findings: tuple[str, ...]
    boxes: Mapping[str, Boxes]  # as drawn, whatever their corners; none where nobody drew one
    readers: Mapping[str, Sequence[str]]  # who looked, as far as they are named
    frames_px: Mapping[str, list[int]]  # [height, width] of what the corners refer to, where the file says so
    unsure: Mapping[str, set[str]]  # findings of which the file's words on an image contradict each other
    notes: Sequence[str]

    def labels(self, images: Sequence[str]) -> np.ndarray:
        """int8 (N, findings): positive where somebody drew a box; unknown for images that the file does not name."""
        labels = rater_agreement.labels([self.boxes.get(image) for image in images], self.findings)
        for labels_F, image in zip(labels, images, strict=True):
            for finding in self.unsure.get(image, ()):
                number = self.findings.index(finding)
                labels_F[number] = schema.POSITIVE if labels_F[number] == schema.POSITIVE else schema.UNKNOWN
        return labels


def read(location: str, *, by_name: bool = False) -> Read:
    """Read such a file.

    The same row twice is one. Where a reader both found nothing and drew a finding, what he drew is unknown unless
    another reader drew it; where a class is not understood, so is whatever nobody drew.

    Args:
        by_name: classes go by their names, as VinDr-CXR's; otherwise by their numbers, if the file has these.

    Raises:
        UserError: it is not such a file, or a row is not understood; the message names the row.
    """
    table = read_csv(location, (IMAGE, *rater_agreement.CORNERS))
    by_id = CLASS in table and not by_name
    if not by_id and CLASS_NAME not in table:
        raise UserError(f"{location}: expected a column {CLASS} or {CLASS_NAME}, got {', '.join(table.header)}")
    findings = schema.VINBIGDATA_FINDINGS if by_id else schema.VINDR_LOCAL_FINDINGS
    who = table.column(READER) if READER in table else [""] * len(table.rows)
    columns = image_keys(table, IMAGE), table.column(CLASS if by_id else CLASS_NAME), who
    known = _classes(findings, by_id)
    drawn: dict[str, dict[tuple[str, ...], dict[str, Any]]] = {}
    looked: dict[str, dict[str, None]] = defaultdict(dict)
    healthy: set[tuple[str, str]] = set()  # images and the readers who found nothing there
    unsure: dict[str, set[str]] = defaultdict(set)
    strange: Counter[str] = Counter()
    corner_columns = zip(*(table.column(name) for name in rater_agreement.CORNERS), strict=True)
    for row, (image, word, reader, corners) in enumerate(zip(*columns, corner_columns, strict=True)):
        of_image = drawn.setdefault(image, {})
        if reader:
            looked[image][reader] = None
        finding = known.get(word.removesuffix(".0") if by_id else word_key(word))
        if finding == NO_FINDING:
            healthy.add((image, reader))
        elif finding is not None:
            of_image[finding, reader, *corners] = _box(table, row, finding, reader, corners)
        elif by_id:
            raise table.error(row, f"a {CLASS} from 0 to {NO_FINDING_ID}", word)
        else:
            strange[word] += 1
            unsure[image] |= {*findings}
    file = storage.name(location)
    notes = unknown_words_note(strange, file, "what else these images show is unknown")
    contradictions = 0
    for image, of_image in drawn.items():
        doubted = [key for key in of_image if (image, key[1]) in healthy]
        contradictions += len({key[1] for key in doubted})
        for key in doubted:
            unsure[image].add(of_image.pop(key)[schema.LABEL])
    if contradictions:
        notes.append(
            f"readings in which nothing was found and a finding drawn: {contradictions:,}; what they drew is unknown"
        )
    boxes = {image: list(of_image.values()) for image, of_image in drawn.items()}
    named = {image: tuple(looked[image]) for image in boxes}
    return Read(findings, boxes, named, _frames(table), unsure, notes)


def read_frames(location: str, *pairs: tuple[str, str]) -> dict[str, list[int]]:
    """[height, width] by image, from the first of these pairs of columns that a table has.

    Raises:
        UserError: it has none of them, or a size that no image has; the message names the row.
    """
    table = read_csv(location, (IMAGE,))
    for pair in pairs:
        if all(name in table for name in pair):
            return _frames(table, pair)
    expected = " or ".join(" and ".join(pair) for pair in pairs)
    raise UserError(f"{location}: expected the columns {expected}, got {', '.join(table.header)}")


def _frames(table: CsvTable, names: tuple[str, str] = FRAME) -> dict[str, list[int]]:
    """What the table says of the images' sizes; blank fields say nothing."""
    sizes: dict[str, list[int]] = {}
    if not all(name in table for name in names):
        return sizes
    told: dict[str, int] = {}
    for row, (image, *sides) in enumerate(zip(image_keys(table, IMAGE), *map(table.column, names), strict=True)):
        if not any(sides):
            continue
        size = [_side_px(side) for side in sides]
        if None in size:
            expected = f"{' and '.join(names)} as whole numbers of pixels from 1 to {_LARGEST_PX:,}"
            raise table.error(row, expected, ", ".join(sides))
        if sizes.setdefault(image, size) != size:  # pyright: ignore[reportArgumentType]
            expected = f"{' and '.join(names)} as in line {table.lines[told[image]]}, which is of the same image"
            raise table.error(row, expected, ", ".join(sides))
        told.setdefault(image, row)
    return sizes


def _side_px(text: str) -> int | None:
    """Pixels, also as other software writes them ("3000.0"); None for what is no size of an image."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if 1 <= number <= _LARGEST_PX and number.is_integer() else None


def _classes(findings: Sequence[str], by_id: bool) -> dict[str, str]:
    """The finding that each number in the column of classes stands for, or the `word_key` of each name."""
    if by_id:
        return {str(number): name for number, name in enumerate([*findings, NO_FINDING])}
    return {word_key(name): name for name in (*findings, NO_FINDING)}


def _box(table: CsvTable, row: int, finding: str, reader: str, corners: Sequence[str]) -> dict[str, Any]:
    """A box as it was drawn; a blank corner is no number, as in tables that pandas has written."""
    try:
        numbers = [float(corner or "nan") for corner in corners]
    except ValueError:
        raise table.error(row, f"numbers in {', '.join(rater_agreement.CORNERS)}", ", ".join(corners)) from None
    return {
        schema.LABEL: finding,
        schema.READER: reader or None,
        **dict(zip(rater_agreement.CORNERS, numbers, strict=True)),
    }


def labeled(manifest: Manifest, labeling: Labeling) -> Manifest:
    """The manifest with labels and boxes as asked for; the one given where nothing is.

    With annotations only the images stay that these name; files, patients and splits stay as the source has them.

    Raises:
        UserError: annotations that name none of the images, or boxes without readers who could agree.
    """
    if labeling.annotations:
        manifest = _annotated(manifest, storage.normalize(labeling.annotations))
    return _agreed(manifest, labeling.readers_agree) if labeling.readers_agree > 1 else manifest


def one_reader(manifest: Manifest, how: ReaderBoxes) -> Manifest:
    """The manifest with one set of boxes an image, where several readers drew theirs."""
    table = manifest.table
    made, looked = rater_agreement.one_set(table[schema.BOXES].to_pylist(), table[schema.EXTRA].to_pylist(), how)
    several = int((looked > 1).sum())
    if not several:
        return manifest
    notes = [*manifest.notes, f"boxes of several readers in {several:,} images: one set by {how}"]
    boxes = pa.array(made, schema.MANIFEST.field(schema.BOXES).type)
    return Manifest(_replaced(table, schema.BOXES, boxes), manifest.findings, notes)


def _annotated(manifest: Manifest, location: str) -> Manifest:
    told, images = read(location), [image_key(image_id) for image_id in manifest.table[schema.IMAGE_ID].to_pylist()]
    named = [image for image in images if image in told.boxes]
    file = storage.name(location)
    if not named:
        raise UserError(f"{location} names none of the {len(images):,} images: give the annotations of this archive")
    table = manifest.table.filter(pa.array([image in told.boxes for image in images]))
    frames = [
        told.frames_px.get(image, own)
        for image, own in zip(named, table[schema.BOXES_FRAME].to_pylist(), strict=True)
    ]
    columns = {schema.BOXES: [told.boxes[image] for image in named], schema.BOXES_FRAME: frames}
    for name, values in columns.items():
        table = _replaced(table, name, pa.array(values, schema.MANIFEST.field(name).type))
    table = _replaced(table, schema.LABELS, labels_column(told.labels(named)))
    notes = [*manifest.notes, *told.notes, f"labels and boxes of {len(named):,} of {len(images):,} images: {file}"]
    if missing := len(told.boxes.keys() - set(named)):
        notes.append(f"{missing:,} of the {len(told.boxes):,} images that {file} names are not here")
    return Manifest(table, told.findings, notes)


def _agreed(manifest: Manifest, agree: int) -> Manifest:
    """Labels by the number of readers who saw a finding; those that no named reader gave stay as they are."""
    boxes, extras = (manifest.table[name].to_pylist() for name in (schema.BOXES, schema.EXTRA))
    if not any(box[schema.READER] for of_image in boxes for box in of_image or ()):
        raise UserError(f"readers_agree={agree}: these boxes are of no named readers. Leave it out")
    labels = np.array(manifest.table[schema.LABELS].to_pylist(), np.int8)
    labels = labels_column(rater_agreement.agreed(labels, boxes, extras, manifest.findings, agree))
    note = f"a finding is positive where {agree} readers have seen it"
    return Manifest(_replaced(manifest.table, schema.LABELS, labels), manifest.findings, [*manifest.notes, note])


def _replaced(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), values)
