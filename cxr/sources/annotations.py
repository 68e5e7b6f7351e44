"""Radiologists' boxes as CSV files with the columns of VinBigData or VinDr-CXR (Nguyen et al. 2022).

    image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
    image_id,rad_id,class_name,x_min,y_min,x_max,y_max

A row is a box that a reader (radiologist) drew, or, with class 14 ("No finding") and no corners, a reader who
reported no finding. A consensus has no column rad_id. Corners are in the pixels to which the boxes of the images'
source refer or, if there are columns width and height, in pixels of an image of that size.

Files that people make for their own images may name other classes. `Classes` says how to read them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement
from cxr.sources.csv_table import CsvTable, read_csv
from cxr.sources.label_rows import listed_keys, unknown_words_note, word_key

IMAGE, CLASS, READER = "image_id", "class_id", "rad_id"
CLASS_NAME = "class_name"
HEADER = (IMAGE, CLASS_NAME, CLASS, READER, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
FRAME = ("height", "width")  # columns with the image size to which a row's corners refer
_LARGEST_PX = 65_535  # DICOM's Rows and Columns are unsigned 16-bit numbers

Boxes = list[dict[str, Any]]  # items of schema.BOX_TYPE

Classes = Literal["number", "vindr", "own"]
"""How a file says which finding a row is about. number: by VinBigData's class number or, in a file without numbers,
like vindr. vindr: by the name of one of VinDr-CXR's local findings. own: like number if all names agree with
VinBigData's numbers; otherwise by name, and the findings are those that the file names, in its order."""
NO_FINDING_WORDS = frozenset(("nofinding", "nofindings", "normal"))  # by `word_key`, among a file's own names


@dataclass(frozen=True)
class Read:
    """The contents of an annotation file by image (`image_key`), in the file's order."""

    findings: tuple[str, ...]
    boxes: Mapping[str, Boxes | None]  # as drawn, with unchecked corners; empty if no box was drawn; null if unknown
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


def read(location: str, classes: Classes = "number") -> Read:
    """Read an annotation file.

    Repeated rows count once. If a reader both reported "No finding" and drew a finding, that finding is unknown
    unless another reader drew it. If a class name of an image is not recognized, all findings that nobody drew are
    unknown.

    Raises:
        UserError: the file has other columns, or a row is invalid; the message names the line.
    """
    table = read_csv(location, (IMAGE, *rater_agreement.CORNERS))
    if CLASS not in table and CLASS_NAME not in table:
        raise UserError(f"{location}: expected a column {CLASS} or {CLASS_NAME}, got {', '.join(table.header)}")
    by_number = CLASS in table and (
        classes == "number" or CLASS_NAME not in table or (classes == "own" and _has_vinbigdata_classes(table))
    )
    words = table.column(CLASS if by_number else CLASS_NAME)
    findings, known = _findings(words, by_number, classes)
    row_readers = table.column(READER) if READER in table else [""] * len(table)
    unique_boxes: dict[str, dict[tuple[str, ...], dict[str, Any]]] = {}
    readers_by_image: dict[str, dict[str, None]] = defaultdict(dict)
    healthy: set[tuple[str, str]] = set()  # (image, reader) pairs with "No finding"
    unsure: dict[str, set[str]] = defaultdict(set)
    unknown_words: Counter[str] = Counter()
    columns = listed_keys(table, IMAGE).to_pylist(), words, row_readers
    corner_columns = zip(*(table.column(name) for name in rater_agreement.CORNERS), strict=True)
    for row, (image, word, reader, corners) in enumerate(zip(*columns, corner_columns, strict=True)):
        of_image = unique_boxes.setdefault(image, {})
        if reader:
            readers_by_image[image][reader] = None
        finding = known.get(word.removesuffix(".0") if by_number else word_key(word))
        if finding == schema.NO_FINDING:
            healthy.add((image, reader))
        elif finding is not None:
            of_image[finding, reader, *corners] = _box(table, row, finding, reader, corners)
        elif by_number:
            raise table.error(row, f"a {CLASS} from 0 to {schema.NO_FINDING_CLASS}", word)
        elif classes == "own":  # only a blank name is unknown
            if any(corners):
                raise table.error(row, f"a finding in {CLASS_NAME} for this box", word)
            healthy.add((image, reader))
        else:
            unknown_words[word] += 1
            unsure[image] |= {*findings}
    file = storage.name(location)
    notes = unknown_words_note(unknown_words, file, "all other findings of these images are unknown")
    contradictions = 0
    for image, of_image in unique_boxes.items():
        contradictory = [key for key in of_image if (image, key[1]) in healthy]
        contradictions += len({key[1] for key in contradictory})
        for key in contradictory:
            unsure[image].add(of_image.pop(key)[schema.LABEL])
    if classes == "own" and CLASS in table and not by_number:
        notes.append(
            f"findings in {file} are read from {CLASS_NAME}, because {CLASS} differs from VinBigData's numbers"
        )
    if contradictions:
        notes.append(
            f"readings with both 'No finding' and a box: {contradictions:,}; the findings of these boxes are unknown"
        )
    boxes = {image: list(of_image.values()) for image, of_image in unique_boxes.items()}
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
    for row, (image, *sides) in enumerate(
        zip(listed_keys(table, IMAGE).to_pylist(), *map(table.column, names), strict=True)
    ):
        if not any(sides):
            continue
        size = [side_px(side) for side in sides]
        if None in size:
            expected = f"{' and '.join(names)} as whole numbers of pixels from 1 to {_LARGEST_PX:,}"
            raise table.error(row, expected, ", ".join(sides))
        if sizes.setdefault(image, size) != size:  # pyright: ignore[reportArgumentType]
            expected = f"the same {' and '.join(names)} as in line {table.lines[first_row[image]]} for the same image"
            raise table.error(row, expected, ", ".join(sides))
        first_row.setdefault(image, row)
    return sizes


def side_px(text: str) -> int | None:
    """Pixels, also if written as "3000.0"; None if it is not a valid image size."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if 1 <= number <= _LARGEST_PX and number.is_integer() else None


def _findings(words: Sequence[str], by_number: bool, classes: Classes) -> tuple[tuple[str, ...], dict[str, str]]:
    """The file's findings in order; and findings by class number, or by the `word_key` of the class name."""
    if by_number:
        numbered = enumerate([*schema.VINBIGDATA_FINDINGS, schema.NO_FINDING])
        return schema.VINBIGDATA_FINDINGS, {str(number): name for number, name in numbered}
    if classes != "own":
        names = schema.VINDR_LOCAL_FINDINGS
        return names, {word_key(name): name for name in (*names, schema.NO_FINDING)}
    spellings: dict[str, str] = {}
    for word in dict.fromkeys(words):
        spellings.setdefault(word_key(word), word)
    spellings.pop("", None)
    names = tuple(name for key, name in spellings.items() if key not in NO_FINDING_WORDS)
    return names, spellings | dict.fromkeys(NO_FINDING_WORDS, schema.NO_FINDING)


def _has_vinbigdata_classes(table: CsvTable) -> bool:
    """Whether every class name in the table is VinBigData's name of its class number; blank names do not matter."""
    names = [word_key(name) for name in (*schema.VINBIGDATA_FINDINGS, schema.NO_FINDING)]
    pairs = {
        (number.removesuffix(".0"), word_key(name))
        for number, name in zip(table.column(CLASS), table.column(CLASS_NAME), strict=True)
        if word_key(name)
    }
    return pairs <= {(str(number), name) for number, name in enumerate(names)}


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
