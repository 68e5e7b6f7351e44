"""ChestX-ray14 as the NIH Clinical Center publishes it (Wang et al., CVPR 2017).

    Data_Entry_2017_v2020.csv or Data_Entry_2017.csv, BBox_List_2017.csv, train_val_list.txt, test_list.txt
    images/*.png, or images_001/images/*.png … images_012/images/*.png, or anywhere below

The published PNGs are the originals resized to 1024 x 1024 without keeping their aspect. The manifest's boxes
and spacing refer to that frame (`base.boxes_frame_px`), so that copies of another size can be read as well.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.base import Manifest, labels_column, manifest_table
from cxr.sources.listing import PATH, image_ids, list_images
from cxr.sources.splits import split_by_patient

name = "chestxray14"

ENTRY_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the first that is there counts
BOXES_FILE = "BBox_List_2017.csv"
TEST_FILE, TRAIN_VAL_FILE = "test_list.txt", "train_val_list.txt"
FRAME_PX = 1024

# Columns of the entry file that are understood; all of them go into `extra`.
INDEX, FINDINGS, PATIENT, VIEW = "Image Index", "Finding Labels", "Patient ID", "View Position"
ORIGINAL_PX = ("OriginalImage[Height]", "OriginalImage[Width]")
ORIGINAL_SPACING_MM = ("OriginalImagePixelSpacing[y]", "OriginalImagePixelSpacing[x]")
NO_FINDING = "No Finding"
ALIASES = {"Infiltrate": "Infiltration"}  # the box list's word

_BOXES_TYPE = schema.MANIFEST.field(schema.BOXES).type


def detect(uri: str) -> bool:
    return _entry_file(uri) is not None


def manifest(uri: str) -> Manifest:
    """Every image file below `uri` once, with what the published lists say of it by its name.

    Images that the entry file lists but that are not there are left out; the labels of images that it does
    not list are unknown; notes say how many. Boxes are null where the box list is silent: that is not "none".

    Raises:
        UserError: there is no entry file, one of the lists is broken, or there is no image.
    """
    file = _entry_file(uri)
    if file is None:
        raise UserError(f"{uri} has no {' or '.join(ENTRY_FILES)}: put it there, or choose the source folder")
    entries, entry_notes = _read_entries(storage.join(uri, file))
    files, file_notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    names = pc.replace_substring_regex(paths, r"^.*/", "")
    rows = pc.index_in(names, value_set=entries[INDEX])
    listed = entries.take(rows)
    ids, id_notes = image_ids(paths, names)
    patient_ids = _patient_ids(listed[PATIENT], names, ids)
    labels, label_notes = _labels(listed[FINDINGS])
    in_test, in_train_val = _named_in(uri, TEST_FILE, names), _named_in(uri, TRAIN_VAL_FILE, names)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: patient_ids,
        schema.SPLIT: split_by_patient(patient_ids, in_test, in_train_val),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.VIEW: _blank_to_null(listed[VIEW]),
        schema.LABELS: labels,
        schema.BOXES: _boxes(uri, names),
        schema.EXTRA: _extra(listed),
        schema.SPACING_MM: _spacing_mm(listed),
    }
    presence_notes = _presence_notes(file, entries, rows)
    notes = [*entry_notes, *file_notes, *presence_notes, *id_notes, *label_notes]
    return Manifest(manifest_table(columns, FRAME_PX), schema.FINDINGS, notes)


# ---- The published lists


def _entry_file(uri: str) -> str | None:
    return next((file for file in ENTRY_FILES if storage.exists(storage.join(uri, file))), None)


def _read_entries(location: str) -> tuple[pa.Table, list[str]]:
    """The entry file's columns as published, all strings, and notes."""
    header, _, body = storage.read_bytes(location).partition(b"\n")
    columns = _column_names(header.decode("utf-8-sig", "replace"))
    if missing := {INDEX, FINDINGS, PATIENT, VIEW} - set(columns):
        raise UserError(f"{location} lacks the columns {sorted(missing)}; its header gives {columns}")
    odd: list[pa_csv.InvalidRow] = []
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(body),
            pa_csv.ReadOptions(column_names=columns),
            pa_csv.ParseOptions(invalid_row_handler=lambda row: odd.append(row) or "skip"),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{location} cannot be read as CSV ({error}): fetch it again") from None
    misfits = f"lines of {storage.name(location)} that do not fit its header, left out: {len(odd):,}"
    return table.select([column for column in columns if column]).combine_chunks(), [misfits] if odd else []


def _column_names(header: str) -> list[str]:
    """Names in a header where "A[b,c]" stands for A[b] and A[c]; a comma at its end makes a blank one."""
    one_by_one = re.sub(r"(\w+)\[(\w+),(\w+)\]", r"\1[\2],\1[\3]", header.strip())
    return [column.strip() for column in next(csv.reader([one_by_one]))]


def _named_in(uri: str, list_file: str, names: pa.Array) -> np.ndarray | None:
    """bool (N), whether an official list names each image; None if the list is not there."""
    location = storage.join(uri, list_file)
    if not storage.exists(location):
        return None
    listed = storage.read_bytes(location).decode("utf-8-sig", "replace").split()
    return pc.is_in(names, value_set=pa.array(listed, pa.string())).to_numpy(zero_copy_only=False)


def _boxes(uri: str, names: pa.Array) -> pa.Array:
    """`boxes` in the 1024 x 1024 frame. The list's header is odd, so its columns go by position."""
    location = storage.join(uri, BOXES_FILE)
    if not storage.exists(location):
        return pa.nulls(len(names), _BOXES_TYPE)
    lines = storage.read_bytes(location).decode("utf-8-sig", "replace").splitlines()
    boxes: dict[str, list[dict[str, str | float]]] = defaultdict(list)
    for number, line in enumerate(csv.reader(lines[1:]), start=2):
        try:
            image, label = line[:2]
            x, y, width, height = map(float, line[2:6])
        except ValueError:
            wanted = "image, label, x, y, width, height"
            raise UserError(f"{location}, line {number}: wanted {wanted}; mend the line") from None
        corners = {schema.X_MIN: x, schema.Y_MIN: y, schema.X_MAX: x + width, schema.Y_MAX: y + height}
        boxes[image].append({schema.LABEL: ALIASES.get(label, label), **corners})
    return pa.array([boxes.get(image) for image in names.to_pylist()], _BOXES_TYPE)


# ---- The manifest's columns


def _patient_ids(listed: pa.ChunkedArray, names: pa.Array, ids: pa.Array) -> pa.Array:
    """The entry file's patient; else the one in a name such as 00000013_005.png; else the image itself."""
    in_name = pc.struct_field(pc.extract_regex(names, r"^0*(?P<patient>\d+)_\d+\."), "patient")
    return pc.coalesce(_blank_to_null(listed), in_name, ids)


def _labels(listed: pa.ChunkedArray) -> tuple[pa.Array, list[str]]:
    """`labels` from "Effusion|Mass" or "No Finding"; unknown where nothing is said in known words."""
    encoded = listed.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    words = [{ALIASES.get(word, word) for word in text.split("|")} - {""} for text in map(str, texts)]
    known = {*schema.FINDINGS, NO_FINDING}
    labels_TC = np.full((len(texts) + 1, len(schema.FINDINGS)), schema.UNKNOWN, np.int8)  # T texts and null
    for labels_C, said in zip(labels_TC[:-1], words, strict=True):
        if said & known:
            labels_C[:] = [schema.POSITIVE if finding in said else schema.NEGATIVE for finding in schema.FINDINGS]
    codes = encoded.indices.fill_null(len(texts)).to_numpy()
    strange = set().union(*words) - known
    notes = [f"labels that are none of the findings are left out: {', '.join(sorted(strange))}"] if strange else []
    return labels_column(labels_TC[codes]), notes


def _spacing_mm(listed: pa.Table) -> pa.Array:
    """[between rows, between columns] of the 1024 x 1024 frame: the original's spacing x its size / 1024."""
    sides = [
        _numbers(listed, px) * _numbers(listed, mm) / FRAME_PX
        for px, mm in zip(ORIGINAL_PX, ORIGINAL_SPACING_MM, strict=True)
    ]
    spacing_N2 = np.stack(sides, axis=1)
    unknown_N = ~(spacing_N2 > 0).all(axis=1)
    values = pa.array(spacing_N2.reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(values, 2, mask=pa.array(unknown_N))


def _numbers(listed: pa.Table, column: str) -> np.ndarray:
    """float64 (N), NaN where there is no number."""
    if column not in listed.column_names:
        return np.full(listed.num_rows, np.nan)
    text = listed[column].combine_chunks()
    numeric = pc.match_substring_regex(text, r"^\d+(\.\d*)?$")
    return pc.if_else(numeric, text, None).cast(pa.float64()).to_numpy(zero_copy_only=False)


def _extra(listed: pa.Table) -> pa.Array:
    """The entry file's columns as published, a JSON object an image; null for images it does not list."""
    lines = listed.to_pylist()
    return pa.array([json.dumps(line) if line[INDEX] is not None else None for line in lines], pa.string())


def _blank_to_null(text: pa.ChunkedArray) -> pa.Array:
    return pc.if_else(pc.equal(text, ""), None, text).combine_chunks()


def _presence_notes(file: str, entries: pa.Table, rows: pa.Array) -> list[str]:
    """Words on listed images that are not there, and on images that are not listed."""
    notes, missing = [], len(entries) - len(rows.drop_null().unique())
    if missing:
        listed = f"{missing:,} of the {len(entries):,} images that {file} lists"
        notes.append(f"{listed} are not here; going on with {len(rows):,}")
    if rows.null_count:
        notes.append(f"{rows.null_count:,} images are not listed in {file}: their labels are unknown")
    return notes
