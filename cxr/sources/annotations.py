"""Radiologists' boxes as CSV files with the columns of VinBigData or VinDr-CXR (Nguyen et al. 2022).

    image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
    image_id,rad_id,class_name,x_min,y_min,x_max,y_max

A row is a box that a reader (radiologist) drew, or, with class 14 ("No finding") and no corners, a reader who
reported no finding. A consensus has no column rad_id. Corners are in the pixels to which the boxes of the images'
source refer or, if there are columns width and height, in pixels of an image of that size.

Files that people make for their own images may name other classes. `Classes` says how to read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement
from cxr.sources.csv_table import CsvTable, read_csv
from cxr.sources.image_files import image_keys
from cxr.sources.image_table import blank_as_null, by_text
from cxr.sources.label_rows import ImageKeys, listed_keys, numbered_images, unknown_words_note, word_key

IMAGE, CLASS, READER = "image_id", "class_id", "rad_id"
CLASS_NAME = "class_name"
HEADER = (IMAGE, CLASS_NAME, CLASS, READER, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
FRAME = ("height", "width")  # columns with the image size to which a row's corners refer
FRAME_PX = "frame_px"
FRAME_TYPE, BOXES_TYPE = (schema.MANIFEST.field(name).type for name in (schema.BOXES_FRAME, schema.BOXES))
NO_FRAMES = pa.schema([(IMAGE, pa.string()), (FRAME_PX, FRAME_TYPE)]).empty_table()
_UNKNOWN = -1  # in place of a finding's number
_LARGEST_PX = 65_535  # DICOM's Rows and Columns are unsigned 16-bit numbers

Classes = Literal["number", "vindr", "own"]
"""How a file says which finding a row is about. number: by VinBigData's class number or, in a file without numbers,
like vindr. vindr: by the name of one of VinDr-CXR's local findings. own: like number if all names agree with
VinBigData's numbers; otherwise by name, and the findings are those that the file names, in its order."""
NO_FINDING_WORDS = frozenset(("nofinding", "nofindings", "normal"))  # by `word_key`, among a file's own names


@dataclass(frozen=True)
class Read:
    """The contents of an annotation file, one row per image, in the file's order."""

    findings: tuple[str, ...]
    images: pa.Array
    """The key of each; see `label_rows.ImageKeys`."""
    labels: np.ndarray
    """int8 (N, findings): positive if a reader drew a box; unknown if the rows of an image contradict each other."""
    boxes: pa.Array
    """Lists of schema.BOX_TYPE, as drawn, with unchecked corners; empty if no box was drawn; null if unknown."""
    readers: pa.Array
    """Lists of texts: who read the image, if named."""
    sizes: pa.Table
    """[height, width] that the corners refer to, as far as the file has them; see `read_frames`."""
    notes: Sequence[str]

    @classmethod
    def of(
        cls,
        findings: Sequence[str],
        boxes: Mapping[str, Sequence[rater_agreement.Box] | None],
        frames_px: Mapping[str, Sequence[int]],
        notes: Sequence[str],
    ) -> Read:
        """The contents of a file that names no readers, by the images' keys."""
        return cls(
            tuple(findings),
            pa.array(list(boxes), pa.string()),
            rater_agreement.labels(boxes.values(), findings),
            pa.array(list(boxes.values()), BOXES_TYPE),
            pa.array([[]] * len(boxes), pa.list_(pa.string())),
            pa.table(
                [pa.array(list(frames_px), pa.string()), pa.array(list(frames_px.values()), FRAME_TYPE)],
                schema=NO_FRAMES.schema,
            ),
            notes,
        )

    def rows_of(self, images: pa.Array) -> pa.Array:
        """The row of each image; null for images that the file does not list."""
        return pc.index_in(images, value_set=self.images)

    def labels_of(self, images: pa.Array) -> np.ndarray:
        """int8 (N, findings); unknown for images that the file does not list."""
        unknown = np.full((1, len(self.findings)), schema.UNKNOWN, np.int8)
        return np.concatenate([self.labels, unknown])[pc.fill_null(self.rows_of(images), len(self.images)).to_numpy()]


@dataclass(frozen=True)
class _Rows:
    """The finding, image and reader of each row by number, and its class as written."""

    findings: tuple[str, ...]
    images: pa.Array
    readers: pa.Array
    finding: np.ndarray  # len(findings): no finding; or _UNKNOWN
    image: np.ndarray
    reader: np.ndarray
    words: pa.DictionaryArray
    by_number: bool

    @property
    def box(self) -> np.ndarray:
        return (self.finding >= 0) & (self.finding < len(self.findings))

    @property
    def unknown(self) -> np.ndarray:
        return self.finding == _UNKNOWN

    @property
    def pair(self) -> np.ndarray:
        """The number of each row's pair of an image and a reader."""
        return self.image * len(self.readers) + self.reader


def read(location: str, classes: Classes = "number", keys_of: ImageKeys = image_keys) -> Read:
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
    rows = _rows(table, classes, keys_of)
    row_B = np.flatnonzero(rows.box)
    corners_B4 = _corners(table, row_B, _first_unknown(table, rows, classes))
    if classes == "own":  # rows without a class and without a box report no finding
        rows = replace(rows, finding=np.where(rows.unknown, len(rows.findings), rows.finding))

    first_B = _first_of_each(table, row_B, rows)
    row_B, corners_B4 = row_B[first_B], corners_B4[first_B]
    reported_no_finding_M = rows.finding == len(rows.findings)
    contradictory_B = np.isin(rows.pair[row_B], rows.pair[reported_no_finding_M])
    certain_B = row_B[~contradictory_B]
    return Read(
        rows.findings,
        rows.images,
        _labels(rows, certain_B, row_B[contradictory_B]),
        _box_lists(rows, certain_B, corners_B4[~contradictory_B]),
        _reader_lists(rows),
        _frames(table, keys_of=keys_of),
        _notes(table, rows, row_B[contradictory_B], storage.name(location), classes),
    )


def _rows(table: CsvTable, classes: Classes, keys_of: ImageKeys) -> _Rows:
    by_number = CLASS in table and (
        classes == "number" or CLASS_NAME not in table or (classes == "own" and _has_vinbigdata_classes(table))
    )
    words = table.texts(CLASS if by_number else CLASS_NAME).combine_chunks().dictionary_encode()
    spellings = words.dictionary.to_pylist()
    findings, known = _findings(spellings, by_number, classes)
    named = [known.get(word.removesuffix(".0") if by_number else word_key(word)) for word in spellings]
    numbers = [_UNKNOWN if name is None else (*findings, schema.NO_FINDING).index(name) for name in named]
    finding_M = np.array(numbers, np.int64)[words.indices.to_numpy()]
    image_M, images = numbered_images(table, IMAGE, keys_of)
    reader_M, readers = numbered(table.texts(READER) if READER in table else pa.repeat(pa.scalar(""), len(table)))
    return _Rows(findings, images, readers, finding_M, image_M, reader_M, words, by_number)


def _labels(rows: _Rows, certain_B: np.ndarray, contradictory_B: np.ndarray) -> np.ndarray:
    """int8 (N, findings), from the rows with certain and with contradictory boxes."""
    labels_NF = np.full((len(rows.images), len(rows.findings)), schema.NEGATIVE, np.int8)
    labels_NF[rows.image[rows.unknown]] = schema.UNKNOWN
    labels_NF[rows.image[contradictory_B], rows.finding[contradictory_B]] = schema.UNKNOWN
    labels_NF[rows.image[certain_B], rows.finding[certain_B]] = schema.POSITIVE
    return labels_NF


def _box_lists(rows: _Rows, row_B: np.ndarray, corners_B4: np.ndarray) -> pa.Array:
    """The boxes of each image."""
    columns = {
        schema.LABEL: pa.array(rows.findings, pa.string()).take(pa.array(rows.finding[row_B])),
        schema.READER: blank_as_null(rows.readers.take(pa.array(rows.reader[row_B]))),
        **{
            name: pa.array(values.astype(np.float32))
            for name, values in zip(rater_agreement.CORNERS, corners_B4.T, strict=True)
        },
    }
    boxes = pa.StructArray.from_arrays(
        [columns[field.name] for field in schema.BOX_TYPE], fields=list(schema.BOX_TYPE)
    )
    return _lists(boxes, rows.image[row_B], len(rows.images))


def _reader_lists(rows: _Rows) -> pa.Array:
    """The named readers of each image, each once."""
    named_M = np.flatnonzero(~pc.equal(rows.readers, "").to_numpy(zero_copy_only=False)[rows.reader])
    first_P = named_M[np.sort(np.unique(rows.pair[named_M], return_index=True)[1])]
    readers = rows.readers.take(pa.array(rows.reader[first_P]))
    return _lists(readers, rows.image[first_P], len(rows.images))


def _notes(table: CsvTable, rows: _Rows, contradictory_B: np.ndarray, file: str, classes: Classes) -> list[str]:
    rows_of_word = np.bincount(rows.words.indices.to_numpy()[rows.unknown], minlength=len(rows.words.dictionary))
    unknown_words = Counter[str]()
    for word, count in zip(rows.words.dictionary.to_pylist(), rows_of_word.tolist(), strict=True):
        unknown_words += Counter({word: count})
    notes = unknown_words_note(unknown_words, file, "all other findings of these images are unknown")
    if classes == "own" and CLASS in table and not rows.by_number:
        notes.append(
            f"findings in {file} are read from {CLASS_NAME}, because {CLASS} differs from VinBigData's numbers"
        )
    if contradictions := len(np.unique(rows.pair[contradictory_B])):
        notes.append(
            f"readings with both 'No finding' and a box: {contradictions:,}; the findings of these boxes are unknown"
        )
    return notes


def numbered(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """int64 (M,) the number of each text, in the order in which they first occur; and the texts by number."""
    encoded = (texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def _lists(values: pa.Array, list_V: np.ndarray, lists: int) -> pa.Array:
    """The values in so many lists; each value's list is given. Values of a list keep their order."""
    ends = np.cumsum(np.bincount(list_V, minlength=lists))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values.take(pa.array(np.argsort(list_V, kind="stable"))))


def _first_unknown(table: CsvTable, rows: _Rows, classes: Classes) -> tuple[int, UserError] | None:
    """The first row whose class is an error, and the error."""
    unknown_M = rows.unknown
    if classes == "own" and not rows.by_number:  # only a blank name is unknown
        filled = [pc.not_equal(table.texts(name), "").to_numpy() for name in rater_agreement.CORNERS]
        unknown_M = unknown_M & np.logical_or.reduce(filled)
        expected = f"a finding in {CLASS_NAME} for this box"
    elif rows.by_number:
        expected = f"a {CLASS} from 0 to {schema.NO_FINDING_CLASS}"
    else:
        return None
    if not unknown_M.any():
        return None
    row = int(unknown_M.argmax())
    return row, table.error(row, expected, rows.words[row].as_py())


def _corners(table: CsvTable, rows_B: np.ndarray, other: tuple[int, UserError] | None) -> np.ndarray:
    """float64 (B, 4), the corners in these rows; blank ones, as in tables written by pandas, are NaN.

    Raises:
        UserError: a corner is not a number, or the other error is of an earlier row.
    """
    at = pa.array(rows_B)
    parsed = [_floats(table.texts(name).combine_chunks().take(at)) for name in rater_agreement.CORNERS]
    wrong_B = np.logical_or.reduce([wrong for _, wrong in parsed])
    row = int(rows_B[wrong_B.argmax()]) if wrong_B.any() else len(table)
    if other and other[0] < row:
        raise other[1]
    if row < len(table):
        corners = ", ".join(table.texts(name)[row].as_py() for name in rater_agreement.CORNERS)
        raise table.error(row, f"numbers in {', '.join(rater_agreement.CORNERS)}", corners)
    return np.stack([values for values, _ in parsed], 1)


def _floats(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """float64 (B,) as Python reads these texts, NaN for blank ones; bool (B,) whether they are not numbers."""
    plain = pc.match_substring_regex(texts, r"^-?\d{1,15}(\.\d{1,15})?$")
    values = pc.if_else(plain, texts, None).cast(pa.float64()).to_numpy(zero_copy_only=False).copy()
    wrong = np.zeros(len(texts), bool)
    other_B = np.flatnonzero(~plain.to_numpy(zero_copy_only=False))
    encoded = texts.take(pa.array(other_B)).dictionary_encode()
    read = [_float(text) for text in encoded.dictionary.to_pylist()]
    if read:
        number_O = encoded.indices.to_numpy()
        values[other_B] = np.array([np.nan if number is None else number for number in read])[number_O]
        wrong[other_B] = np.array([number is None for number in read])[number_O]
    return values, wrong


def _float(text: str) -> float | None:
    """None if it is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return None


def _first_of_each(table: CsvTable, rows_B: np.ndarray, rows: _Rows) -> np.ndarray:
    """Which of these rows are not repetitions of earlier ones, in order."""
    columns = {IMAGE: rows.image[rows_B], CLASS: rows.finding[rows_B], READER: rows.reader[rows_B]}
    for name in rater_agreement.CORNERS:
        columns[name] = (
            table.texts(name).combine_chunks().take(pa.array(rows_B)).dictionary_encode().indices.to_numpy()
        )
    keys = pa.table({**columns, "position": np.arange(len(rows_B))})
    firsts = keys.group_by([*columns], use_threads=False).aggregate([("position", "min")])
    return np.sort(firsts["position_min"].to_numpy())


def read_frames(location: str, *pairs: tuple[str, str]) -> pa.Table:
    """The sizes in a table, columns IMAGE and FRAME_PX, from the first of these pairs of columns that it has.

    Raises:
        UserError: it has none of them, or an invalid size; the message names the line.
    """
    table = read_csv(location, (IMAGE,))
    for pair in pairs:
        if all(name in table for name in pair):
            return _frames(table, pair)
    expected = " or ".join(" and ".join(pair) for pair in pairs)
    raise UserError(f"{location}: expected the columns {expected}, got {', '.join(table.header)}")


def frames_of(sizes: pa.Table, images: pa.Array) -> pa.Array:
    """[height, width] of each image, by its key, from a table as `read_frames` returns it; null if unknown."""
    row = pc.index_in(images, value_set=sizes[IMAGE].combine_chunks())
    return sizes[FRAME_PX].combine_chunks().take(row)


def joined_frames(tables: Iterable[pa.Table]) -> pa.Table:
    """All sizes; of an image in several tables, that of the first."""
    joined = NO_FRAMES
    for sizes in tables:
        known = pc.is_in(sizes[IMAGE], value_set=joined[IMAGE].combine_chunks())
        joined = pa.concat_tables([joined, sizes.filter(pc.invert(known))])
    return joined


def _frames(table: CsvTable, names: tuple[str, str] = FRAME, keys_of: ImageKeys = image_keys) -> pa.Table:
    """The image sizes in the table; rows with blank fields are skipped."""
    if not all(name in table for name in names):
        return NO_FRAMES
    keys, sides = listed_keys(table, IMAGE, keys_of), [table.texts(name).combine_chunks() for name in names]
    rows = np.flatnonzero(pc.or_(*(pc.not_equal(texts, "") for texts in sides)).to_numpy(zero_copy_only=False))
    at = pa.array(rows)
    size_R2 = np.stack([by_text(texts.take(at), lambda text: side_px(text) or 0) for texts in sides], 1).astype(
        np.int32
    )
    image_R, images = numbered(keys.take(at))
    first_N = np.unique(image_R, return_index=True)[1]
    invalid_R, differs_R = (size_R2 == 0).any(1), (size_R2 != size_R2[first_N][image_R]).any(1)
    if (invalid_R | differs_R).any():
        wrong = int((invalid_R | differs_R).argmax())
        expected = f"{' and '.join(names)} as whole numbers of pixels from 1 to {_LARGEST_PX:,}"
        if not invalid_R[wrong]:
            first = table.lines[int(rows[first_N[image_R[wrong]]])]
            expected = f"the same {' and '.join(names)} as in line {first} for the same image"
        row = int(rows[wrong])
        raise table.error(row, expected, ", ".join(texts[row].as_py() for texts in sides))
    sizes = pa.FixedSizeListArray.from_arrays(pa.array(size_R2[first_N].reshape(-1), pa.int32()), 2)
    return pa.table([images, sizes], schema=NO_FRAMES.schema)


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
    both = pa.table({name: table.texts(name) for name in (CLASS, CLASS_NAME)})
    different = both.group_by([CLASS, CLASS_NAME], use_threads=False).aggregate([])
    pairs = {
        (number.removesuffix(".0"), word_key(name))
        for number, name in zip(*(different[name].to_pylist() for name in both.column_names), strict=True)
        if word_key(name)
    }
    return pairs <= {(str(number), name) for number, name in enumerate(names)}
