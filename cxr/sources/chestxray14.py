"""ChestX-ray14 as the NIH Clinical Center publishes it (Wang et al., CVPR 2017).

    Data_Entry_2017_v2020.csv or Data_Entry_2017.csv, BBox_List_2017.csv, train_val_list.txt, test_list.txt
    images/*.png, or images_001/images/*.png … images_012/images/*.png, or anywhere below

Copies of the images in another format or folder keep their labels and splits (see `image_files.image_key`). Case and
blanks in the names of findings are ignored. Unrecognized words and contradictory rows make findings unknown, never
negative.

The published PNGs are the originals resized to 1024 x 1024 without preserving the aspect ratio. The manifest's boxes
and spacing refer to that size (`manifest.boxes_frame_px`), so that copies of another size can be read as well.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.csv_table import read_csv, read_lines
from cxr.sources.image_files import PATH, image_ids, image_keys, list_images
from cxr.sources.image_table import SEXES, ages, blank_as_null, by_text, json_rows, listing_notes, translated
from cxr.sources.label_rows import (
    agreed_labels,
    contradictions_note,
    listed_keys,
    merged_row,
    rows_by_image,
    unknown_words_note,
    word_key,
)
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "chestxray14"

ENTRY_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the first that exists is used
BOXES_FILE = "BBox_List_2017.csv"
TEST_FILE, TRAIN_VAL_FILE = "test_list.txt", "train_val_list.txt"
FRAME_PX = 1024

# Columns of the entry file that are used; all columns are copied to `extra`.
INDEX, FINDINGS, PATIENT, VIEW = "Image Index", "Finding Labels", "Patient ID", "View Position"
SEX = ("Patient Gender", "Patient Sex")  # by release
AGE = "Patient Age"
ORIGINAL_PX = ("OriginalImage[Height]", "OriginalImage[Width]")
ORIGINAL_SPACING_MM = ("OriginalImagePixelSpacing[y]", "OriginalImagePixelSpacing[x]")
_ORIGINAL = tuple(zip(ORIGINAL_PX, ORIGINAL_SPACING_MM, strict=True))
NO_FINDING = "No Finding"  # as the lists spell it

BOX_FINDING = "Finding Label"  # column of the box list
BOX_WORDS = {"Infiltration": "Infiltrate"}  # findings with another name in the box list

_WORDS = {word_key(finding): finding for finding in (*schema.FINDINGS, NO_FINDING)} | {
    "infiltrate": "Infiltration",
    "infiltrates": "Infiltration",
    "pleuraleffusion": "Effusion",
    "oedema": "Edema",
    "nofindings": NO_FINDING,
}
_AROUND_NAMES = " \t,;\"'"  # stripped from names in the official lists, where other software may add them
_BETWEEN_WORDS = re.compile(r"[|;,]")
_PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 365.25 / 7, "D": 365.25}
_LARGEST_SPACING_MM = 1e6  # larger values are not a spacing
_BOXES_TYPE = schema.MANIFEST.field(schema.BOXES).type


def detect(uri: str) -> bool:
    return _entry_file(uri) is not None


def manifest(uri: str) -> Manifest:
    """List every image file below `uri` once, joined to the published lists by its name.

    Listed images without a file are skipped; images that are not listed have unknown labels; notes count both. Boxes
    are null, i.e. unknown, for images that the box list does not contain.

    Raises:
        UserError: there is no entry file, a list is damaged, or there are no images.
    """
    file = _entry_file(uri)
    if file is None:
        raise UserError(f"expected {' or '.join(ENTRY_FILES)} in {uri}, got neither: add it, or use --source folder")
    entries = _read_entries(storage.join(uri, file))
    files, file_notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    keys = image_keys(paths)
    ids, id_notes = image_ids(paths, pc.replace_substring_regex(paths, "^.*/", ""))
    boxes, box_notes = _boxes(uri, keys)
    in_test, in_train_val, list_notes = _official_lists(uri, entries, keys)
    row = pc.index_in(keys, value_set=entries.keys)

    def listed(name: str) -> pa.Array:
        return entries.texts(name, row)

    patient_ids = _patient_ids(listed(PATIENT), keys, ids)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: patient_ids,
        schema.SPLIT: split_by_patient(patient_ids, in_test, in_train_val),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.SEX: pc.coalesce(*(translated(listed(name), SEXES) for name in SEX)),
        schema.AGE_YEARS: ages(by_text(listed(AGE), _years)),
        schema.VIEW: blank_as_null(pc.utf8_upper(listed(VIEW))),
        schema.LABELS: labels_column(entries.labels_of(row)),
        schema.BOXES: boxes,
        schema.SPACING_MM: _spacing_mm(listed),
        schema.EXTRA: json_rows(entries.table, row),
    }
    presence = listing_notes(file, len(entries.keys), row)
    notes = [*file_notes, *presence, *id_notes, *entries.notes, *box_notes, *list_notes]
    return Manifest(manifest_table(columns, FRAME_PX), schema.FINDINGS, notes)


# ---- The published lists


@dataclass(frozen=True)
class _Entries:
    """The entry file with one row per image."""

    file: str
    keys: pa.Array
    table: pa.Table  # all columns that have a name, as text, in one chunk
    labels: np.ndarray  # int8 (N, findings)
    notes: Sequence[str]

    def texts(self, column: str, row: pa.Array) -> pa.Array:
        """A column's texts in these rows; blank where `row` is null, or if the file does not have the column."""
        if column not in self.table.column_names:
            return pa.repeat(pa.scalar(""), len(row))
        return pc.fill_null(self.table[column].combine_chunks().take(row), "")

    def labels_of(self, row: pa.Array) -> np.ndarray:
        """int8 (images, findings) of the images in these rows; unknown where `row` is null."""
        unknown = np.full((1, len(schema.FINDINGS)), schema.UNKNOWN, np.int8)
        return np.concatenate([self.labels, unknown])[pc.fill_null(row, len(self.labels)).to_numpy()]


def _entry_file(uri: str) -> str | None:
    return next((file for file in ENTRY_FILES if storage.exists(storage.join(uri, file))), None)


def _read_entries(location: str) -> _Entries:
    needed = (INDEX, FINDINGS, PATIENT, VIEW)
    table = read_csv(location, needed)
    columns = list(table.header)
    for column in needed:
        columns[table.position(column)] = column
    for at, (first, second) in enumerate(pairwise(table.header)):  # the header "A[b,c]" stands for A[b] and A[c]
        stem, bracket, inner = first.partition("[")
        if bracket and "]" not in inner and second.endswith("]"):
            columns[at : at + 2] = [f"{stem}[{inner}]", f"{stem}[{second}"]
    if not len(table):
        raise UserError(f"{location}: expected one row per image, got none: restore the file")
    keys = listed_keys(table, INDEX)
    named = {column: table.texts(at).combine_chunks() for at, column in enumerate(columns) if column}
    return _merged_entries(storage.name(location), keys, pa.table(named))


def _merged_entries(file: str, keys: pa.Array, table: pa.Table) -> _Entries:
    """Merge the rows of each image; notes count unrecognized words and contradictory rows."""
    texts = table[FINDINGS].combine_chunks().dictionary_encode()
    parsed = [_parse_findings(text) for text in texts.dictionary.to_pylist()]
    agreed = [agreed_labels(each.statements) for each in parsed]
    text_N = texts.indices.to_numpy(zero_copy_only=False)
    labels_NC = np.stack([labels for labels, _ in agreed])[text_N]
    contradicts_N = np.array([differ for _, differ in agreed])[text_N]

    counts = keys.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    several = pc.is_in(keys, value_set=repeated)
    contradictory = int(contradicts_N[~several.to_numpy(zero_copy_only=False)].sum())
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(several.to_numpy(zero_copy_only=False)).tolist():
        rows_of[keys[row].as_py()].append(row)
    merged_rows, merged_labels = [], [labels_NC[:0]]
    at = table.column_names.index(FINDINGS)
    for rows in rows_of.values():
        labels, differ_in_labels = agreed_labels([each for row in rows for each in parsed[text_N[row]].statements])
        values = [[column[row].as_py() for column in table.columns] for row in rows]
        merged, differ = merged_row([[*row[:at], "", *row[at + 1 :]] for row in values])
        merged[at] = "" if differ_in_labels else values[0][at]
        contradictory += differ or differ_in_labels
        merged_rows.append(merged)
        merged_labels.append(labels[None])

    unknown_words: Counter[str] = Counter()
    for each, rows in zip(parsed, np.bincount(text_N, minlength=len(parsed)).tolist(), strict=True):
        unknown_words.update({word: count * rows for word, count in Counter(each.unknown_words).items()})
    notes = unknown_words_note(unknown_words, file, "the other findings of these rows are unknown")
    notes += contradictions_note(contradictory, file)
    once = pc.invert(several)
    if merged_rows:
        merged_columns = [pa.array(column, pa.string()) for column in zip(*merged_rows, strict=True)]
        table = pa.concat_tables([table.filter(once), pa.table(merged_columns, table.column_names)]).combine_chunks()
        keys = pa.concat_arrays([keys.filter(once), pa.array(list(rows_of), pa.string())])
        labels_NC = np.concatenate([labels_NC[once.to_numpy(zero_copy_only=False)], *merged_labels])
    return _Entries(file, keys, table, labels_NC, notes)


def _official_lists(
    uri: str, entries: _Entries, keys: pa.Array
) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """bool (N) for each official list, test and train/val: whether it contains each image; and notes.

    None for a missing list.
    """
    in_lists: list[np.ndarray | None] = []
    notes = []
    for file in (TEST_FILE, TRAIN_VAL_FILE):
        location = storage.join(uri, file)
        if not storage.exists(location):
            in_lists.append(None)
            continue
        names = image_keys(
            pa.array([line.strip(_AROUND_NAMES) for line in read_lines(location)], pa.string())
        ).unique()
        names = names.filter(pc.not_equal(names, ""))
        in_lists.append(pc.is_in(keys, value_set=names).to_numpy(zero_copy_only=False))
        if unlisted := pc.sum(pc.invert(pc.is_in(names, value_set=entries.keys))).as_py():
            notes.append(
                f"listed in {file} but not in {entries.file}: {unlisted:,} of {counted(len(names), 'image')}"
            )
    in_test, in_train_val = in_lists
    if in_test is not None and in_train_val is not None and (both := int((in_test & in_train_val).sum())):
        notes.append(f"listed in both {TEST_FILE} and {TRAIN_VAL_FILE}, used for testing: {counted(both, 'image')}")
    return in_test, in_train_val, notes


def _boxes(uri: str, keys: pa.Array) -> tuple[pa.Array, list[str]]:
    """Column `boxes` in pixels of the 1024 x 1024 image, and notes. Boxes with an unrecognized finding are
    dropped."""
    location = storage.join(uri, BOXES_FILE)
    if not storage.exists(location):
        return pa.nulls(len(keys), _BOXES_TYPE), []
    table = read_csv(location, (INDEX, BOX_FINDING))
    words, corners_at = table.column(BOX_FINDING), _position_of_corners(location, table.header)
    boxes: dict[str, list[dict[str, str | float]]] = {}
    unknown_words: Counter[str] = Counter()
    for key, rows in rows_by_image(table, INDEX).items():
        unique_boxes: dict[tuple[str | float, ...], dict[str, str | float]] = {}  # repeated boxes count once
        for row in rows:
            finding = _WORDS.get(word_key(words[row]), NO_FINDING)
            if finding == NO_FINDING:
                unknown_words[words[row]] += 1
                continue
            values = table.rows[row][corners_at : corners_at + 4]
            try:
                x, y, width, height = map(float, values)
            except ValueError:
                raise table.error(row, "x, y, width and height as numbers", ", ".join(values)) from None
            corners = {schema.X_MIN: x, schema.Y_MIN: y, schema.X_MAX: x + width, schema.Y_MAX: y + height}
            unique_boxes[finding, *corners.values()] = {schema.LABEL: finding, **corners}
        if unique_boxes:
            boxes[key] = list(unique_boxes.values())
    notes = unknown_words_note(unknown_words, BOXES_FILE, "these boxes are dropped")
    row = pc.index_in(keys, value_set=pa.array(list(boxes), pa.string()))
    return pa.array(list(boxes.values()), _BOXES_TYPE).take(row), notes


def _position_of_corners(location: str, header: Sequence[str]) -> int:
    """Index of the first of the columns x, y, width, height; the published header has "Bbox [x,y,w,h]"."""
    letters = [re.sub(r"bbox|[^a-z,]", "", column.casefold()) for column in header]
    for at in range(len(header) - 3):
        if ",".join(letters[at : at + 4]).startswith("x,y,w,h"):
            return at
    raise UserError(f"{location}, line 1: expected adjacent columns x, y, w, h, got none: restore the header")


# ---- The manifest's columns


@dataclass(frozen=True)
class _Parsed:
    """A parsed entry of the column of findings."""

    statements: Sequence[np.ndarray]  # int8 (findings,) each
    unknown_words: Sequence[str]


def _parse_findings(text: str) -> _Parsed:
    """Parse "Effusion|Mass" or "No Finding"; text with both gives two contradictory statements.

    Findings that the text does not name are negative, or unknown if it has an unrecognized word.
    """
    words = [word.strip() for word in _BETWEEN_WORDS.split(text) if word.strip()]
    known = {_WORDS[word_key(word)] for word in words if word_key(word) in _WORDS}
    unknown_words = [word for word in words if word_key(word) not in _WORDS]
    others = schema.NEGATIVE if known and not unknown_words else schema.UNKNOWN
    labels_of_named = (
        [schema.POSITIVE, schema.NEGATIVE] if NO_FINDING in known and len(known) > 1 else [schema.POSITIVE]
    )
    statements = [
        np.array([label if finding in known else others for finding in schema.FINDINGS], np.int8)
        for label in labels_of_named
    ]
    return _Parsed(statements, unknown_words)


def _patient_ids(listed: pa.Array, keys: pa.Array, ids: pa.Array) -> pa.Array:
    """The patient in the entry file; else the one in a file name such as 00000013_005; else the image itself.

    Leading zeros are removed, so that both give the same id.
    """
    in_names = pc.struct_field(pc.extract_regex(keys, r"^(?P<patient>\d+)_\d+$"), "patient")
    patients = pc.coalesce(blank_as_null(listed), in_names)
    return pc.coalesce(pc.replace_substring_regex(patients, r"^0*(\d+)(\.0*)?$", r"\1"), ids)


def _years(age: str) -> float:
    """Years of an age such as "58" or, in the older release, "058Y", "007M" or "012D"; NaN for other texts."""
    match = re.fullmatch(r"(\d{1,3})([YMWD]?)", age, re.ASCII)
    return int(match[1]) / _PER_YEAR[match[2]] if match else np.nan


def _spacing_mm(listed: Callable[[str], pa.Array]) -> pa.Array:
    """Spacing [between rows, between columns] in the 1024 x 1024 image: the original's spacing x its size / 1024."""
    sides = [by_text(listed(px), _number) * by_text(listed(mm), _number) for px, mm in _ORIGINAL]
    spacing_N2 = np.stack(sides, 1) / FRAME_PX
    known_N = np.all((spacing_N2 > 0) & (spacing_N2 < _LARGEST_SPACING_MM), axis=1)
    values = pa.array(np.where(known_N[:, None], spacing_N2, 0).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(values, 2, mask=pa.array(~known_N))


def _number(text: str) -> float:
    """NaN if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return np.nan
