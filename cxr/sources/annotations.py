"""Radiologists' boxes as CSV files with the columns of VinBigData or VinDr-CXR (Nguyen et al. 2022).

    image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
    image_id,rad_id,class_name,x_min,y_min,x_max,y_max

A row is a box that a reader (radiologist) drew, or, with class 14 ("No finding") and no corners, a reader who
reported no finding. A consensus has no column rad_id. Corners are in the pixels to which the boxes of the images'
source refer or, if there are columns width and height, in pixels of an image of that size.
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
from cxr.sources.options import Labeling, ReaderBoxes
from cxr.wording import counted

IMAGE, CLASS, READER = "image_id", "class_id", "rad_id"
CLASS_NAME = "class_name"
HEADER = (IMAGE, CLASS_NAME, CLASS, READER, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
FRAME = ("height", "width")  # columns with the image size to which a row's corners refer
_LARGEST_PX = 65_535  # DICOM's Rows and Columns are unsigned 16-bit numbers

Boxes = list[dict[str, Any]]  # items of schema.BOX_TYPE


@dataclass(frozen=True)
class Read:
    """The contents of an annotation file by image (`image_key`), in the file's order."""

    findings: tuple[str, ...]
    boxes: Mapping[str, Boxes]  # as drawn, with unchecked corners; empty if no box was drawn
    readers: Mapping[str, Sequence[str]]  # who read the image, if named
    frames_px: Mapping[str, list[int]]  # [height, width] that the corners refer to, if the file has it
    unsure: Mapping[str, set[str]]  # findings for which the rows of an image contradict each other
    notes: Sequence[str]

    def labels(self, images: Sequence[str]) -> np.ndarray:
        """int8 (N, findings): positive if any reader drew a box; unknown for images that the file does not list."""
        labels = rater_agreement.labels([self.boxes.get(image) for image in images], self.findings)
        for labels_F, image in zip(labels, images, strict=True):
            for finding in self.unsure.get(image, ()):
                number = self.findings.index(finding)
                labels_F[number] = schema.POSITIVE if labels_F[number] == schema.POSITIVE else schema.UNKNOWN
        return labels


def read(location: str, *, by_name: bool = False) -> Read:
    """Read an annotation file.

    Repeated rows count once. If a reader both reported "No finding" and drew a finding, that finding is unknown
    unless another reader drew it. If a class name of an image is not recognized, all findings that nobody drew are
    unknown.

    Args:
        by_name: identify classes by name, as in VinDr-CXR; otherwise by number, if the file has numbers.

    Raises:
        UserError: the file has other columns, or a row is invalid; the message names the line.
    """
    table = read_csv(location, (IMAGE, *rater_agreement.CORNERS))
    by_id = CLASS in table and not by_name
    if not by_id and CLASS_NAME not in table:
        raise UserError(f"{location}: expected a column {CLASS} or {CLASS_NAME}, got {', '.join(table.header)}")
    findings = schema.VINBIGDATA_FINDINGS if by_id else schema.VINDR_LOCAL_FINDINGS
    row_readers = table.column(READER) if READER in table else [""] * len(table.rows)
    columns = image_keys(table, IMAGE), table.column(CLASS if by_id else CLASS_NAME), row_readers
    known = _classes(findings, by_id)
    drawn: dict[str, dict[tuple[str, ...], dict[str, Any]]] = {}
    readers_by_image: dict[str, dict[str, None]] = defaultdict(dict)
    healthy: set[tuple[str, str]] = set()  # (image, reader) pairs with "No finding"
    unsure: dict[str, set[str]] = defaultdict(set)
    unknown_words: Counter[str] = Counter()
    corner_columns = zip(*(table.column(name) for name in rater_agreement.CORNERS), strict=True)
    for row, (image, word, reader, corners) in enumerate(zip(*columns, corner_columns, strict=True)):
        of_image = drawn.setdefault(image, {})
        if reader:
            readers_by_image[image][reader] = None
        finding = known.get(word.removesuffix(".0") if by_id else word_key(word))
        if finding == schema.NO_FINDING:
            healthy.add((image, reader))
        elif finding is not None:
            of_image[finding, reader, *corners] = _box(table, row, finding, reader, corners)
        elif by_id:
            raise table.error(row, f"a {CLASS} from 0 to {schema.NO_FINDING_CLASS}", word)
        else:
            unknown_words[word] += 1
            unsure[image] |= {*findings}
    file = storage.name(location)
    notes = unknown_words_note(unknown_words, file, "all other findings of these images are unknown")
    contradictions = 0
    for image, of_image in drawn.items():
        contradictory = [key for key in of_image if (image, key[1]) in healthy]
        contradictions += len({key[1] for key in contradictory})
        for key in contradictory:
            unsure[image].add(of_image.pop(key)[schema.LABEL])
    if contradictions:
        notes.append(
            f"readings with both 'No finding' and a box: {contradictions:,}; the findings of these boxes are unknown"
        )
    boxes = {image: list(of_image.values()) for image, of_image in drawn.items()}
    readers = {image: tuple(readers_by_image[image]) for image in boxes}
    return Read(findings, boxes, readers, _frames(table), unsure, notes)


def read_frames(location: str, *pairs: tuple[str, str]) -> dict[str, list[int]]:
    """[height, width] by image, from the first of these pairs of columns that the table has.

    Raises:
        UserError: it has none of them, or an invalid size; the message names the line.
    """
    table = read_csv(location, (IMAGE,))
    for pair in pairs:
        if all(name in table for name in pair):
            return _frames(table, pair)
    expected = " or ".join(" and ".join(pair) for pair in pairs)
    raise UserError(f"{location}: expected the columns {expected}, got {', '.join(table.header)}")


def _frames(table: CsvTable, names: tuple[str, str] = FRAME) -> dict[str, list[int]]:
    """The image sizes in the table; rows with blank fields are skipped."""
    sizes: dict[str, list[int]] = {}
    if not all(name in table for name in names):
        return sizes
    first_row: dict[str, int] = {}
    for row, (image, *sides) in enumerate(zip(image_keys(table, IMAGE), *map(table.column, names), strict=True)):
        if not any(sides):
            continue
        size = [_side_px(side) for side in sides]
        if None in size:
            expected = f"{' and '.join(names)} as whole numbers of pixels from 1 to {_LARGEST_PX:,}"
            raise table.error(row, expected, ", ".join(sides))
        if sizes.setdefault(image, size) != size:  # pyright: ignore[reportArgumentType]
            expected = f"the same {' and '.join(names)} as in line {table.lines[first_row[image]]} for the same image"
            raise table.error(row, expected, ", ".join(sides))
        first_row.setdefault(image, row)
    return sizes


def _side_px(text: str) -> int | None:
    """Pixels, also if written as "3000.0"; None if it is not a valid image size."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if 1 <= number <= _LARGEST_PX and number.is_integer() else None


def _classes(findings: Sequence[str], by_id: bool) -> dict[str, str]:
    """Findings by class number, or by the `word_key` of the class name."""
    if by_id:
        return {str(number): name for number, name in enumerate([*findings, schema.NO_FINDING])}
    return {word_key(name): name for name in (*findings, schema.NO_FINDING)}


def _box(table: CsvTable, row: int, finding: str, reader: str, corners: Sequence[str]) -> dict[str, Any]:
    """A box as drawn; blank corners, as in tables written by pandas, are NaN."""
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
    """Replace a manifest's labels and boxes as `labeling` says.

    With annotations, only the images that they list remain; files, patients and splits are those of the source.

    Raises:
        UserError: the annotations list none of the images, or readers are to agree but the boxes name no readers.
    """
    if labeling.annotations:
        manifest = _annotated(manifest, storage.normalize(labeling.annotations))
    return _agreed(manifest, labeling.readers_agree) if labeling.readers_agree > 1 else manifest


def one_reader(manifest: Manifest, how: ReaderBoxes) -> Manifest:
    """Combine the boxes of several readers into one set per image."""
    table = manifest.table
    boxes_by_image, readers = rater_agreement.one_set(
        table[schema.BOXES].to_pylist(), table[schema.EXTRA].to_pylist(), how
    )
    several = int((readers > 1).sum())
    if not several:
        return manifest
    notes = [*manifest.notes, f"boxes of several readers combined by {how}: {counted(several, 'image')}"]
    boxes = pa.array(boxes_by_image, schema.MANIFEST.field(schema.BOXES).type)
    return Manifest(_replaced(table, schema.BOXES, boxes), manifest.findings, notes)


def _annotated(manifest: Manifest, location: str) -> Manifest:
    annotations, images = (
        read(location),
        [image_key(image_id) for image_id in manifest.table[schema.IMAGE_ID].to_pylist()],
    )
    listed = [image for image in images if image in annotations.boxes]
    file = storage.name(location)
    if not listed:
        raise UserError(
            f"expected annotations of this archive, got {location}, which lists none of its "
            f"{counted(len(images), 'image')}: give another file"
        )
    table = manifest.table.filter(pa.array([image in annotations.boxes for image in images]))
    frames = [
        annotations.frames_px.get(image, own)
        for image, own in zip(listed, table[schema.BOXES_FRAME].to_pylist(), strict=True)
    ]
    columns = {schema.BOXES: [annotations.boxes[image] for image in listed], schema.BOXES_FRAME: frames}
    for name, values in columns.items():
        table = _replaced(table, name, pa.array(values, schema.MANIFEST.field(name).type))
    table = _replaced(table, schema.LABELS, labels_column(annotations.labels(listed)))
    notes = [
        *manifest.notes,
        *annotations.notes,
        f"labels and boxes of {len(listed):,} of {counted(len(images), 'image')}: {file}",
    ]
    if missing := len(annotations.boxes.keys() - set(listed)):
        notes.append(
            f"missing from the archive: {missing:,} of {counted(len(annotations.boxes), 'image')} listed in {file}"
        )
    return Manifest(table, annotations.findings, notes)


def _agreed(manifest: Manifest, agree: int) -> Manifest:
    """Labels by the number of readers who marked a finding; labels not given by named readers are unchanged."""
    boxes, extras = (manifest.table[name].to_pylist() for name in (schema.BOXES, schema.EXTRA))
    if not any(box[schema.READER] for of_image in boxes for box in of_image or ()):
        raise UserError(
            f"expected boxes with named readers for readers_agree={agree}, got none: omit --readers-agree"
        )
    labels = np.array(manifest.table[schema.LABELS].to_pylist(), np.int8)
    labels = labels_column(rater_agreement.agreed(labels, boxes, extras, manifest.findings, agree))
    note = f"a finding is positive if at least {counted(agree, 'reader')} marked it"
    return Manifest(_replaced(manifest.table, schema.LABELS, labels), manifest.findings, [*manifest.notes, note])


def _replaced(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), values)
