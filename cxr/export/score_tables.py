"""Scores as CSV for spreadsheets and statistics: a row for each image, each study (exam) or each patient.

Scores are read, and rows per image written, one part at a time. For rows per study or patient, parts are first
divided by study or patient into temporary files, so that memory holds a small share of a large run at a time.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from cxr import schema
from cxr.data import gate
from cxr.errors import UserError
from cxr.reporting.tables import without_formulas
from cxr.storage.files import atomic_writer

Per = Literal["image", "study", "patient"]
FILES: dict[Per, str] = dict(zip(get_args(Per), ("scores.csv", "studies.csv", "patients.csv"), strict=True))

_IMAGE_COLUMNS = (
    *(name for name in schema.SCORES.names if name not in (schema.RESIZE_TRANSFORM, schema.ERROR)),
    schema.ERROR,
)
_NUMBERS = frozenset({schema.PRED_MASK_AREA_PX, schema.PRED_MASK_PROBABILITY})  # scores that are written as they are
_KEY, _FRONTAL = "key", "frontal"
_BUCKETS = 64
_SPLIT_ROWS = 50_000  # images that are divided into buckets together: each bucket's share must not be tiny
_SORTED_ROWS = 200_000  # images up to which all studies or patients are sorted together

# Columns of the file. The part after the slash is a finding, or the index of a number of `theta`.
PROBABILITY, DECISION, BOX_SCORE, THETA = "probability/", "decision/", "box_score/", "theta/"
BOX_COUNT = "boxes"
# Columns of rows per study or patient: the image with the maximum.
_IMAGE_OF = {PROBABILITY: "image/", BOX_SCORE: "box_image/"}
MASK_IMAGE = "mask_image"


def columns_to_read(score_columns: Sequence[str]) -> list[str]:
    """The columns of scores that `write_csv` needs, for a family with these `score_columns`."""
    return [*_IMAGE_COLUMNS, *(name for name in score_columns if name != schema.PRED_MASK_RLE)]


def write_csv(
    parts: Iterable[pa.Table], uri: str, per: Per = "image", box_thresholds: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Write the scores of a run to `uri`; returns the number of `rows`, and of `images` and `errors` among them.

    A study or patient has the maximum of each score over its frontal images that have no error, and the id of that
    image; an image whose study or patient is unknown counts as one of its own. An image is frontal unless the gate
    or the codes of its DICOM header say that it is not.

    Args:
        parts: tables with the columns of `columns_to_read` and the findings in their metadata.
        box_thresholds: by finding, the score from which on a detector's box decides that the image has the finding.

    Raises:
        UserError: `per` is "study" and no image has a study, or the family's scores cannot be combined.
    """
    images = errors = rows = 0

    def flat() -> Iterator[pa.Table]:
        nonlocal images, errors
        for part in parts:
            images, errors = images + part.num_rows, errors + part.num_rows - part[schema.ERROR].null_count
            yield _flat(part, box_thresholds or {})

    tables = flat() if per == "image" else _combined(flat(), per)
    with atomic_writer(uri) as stream, ExitStack() as closing:
        writer = None
        for table in tables:
            safe = without_formulas(table)
            writer = writer or closing.enter_context(csv.CSVWriter(stream, safe.schema))
            writer.write_table(safe)
            rows += table.num_rows
    return {"rows": rows, "images": images, "errors": errors}


def _flat(part: pa.Table, box_thresholds: Mapping[str, float]) -> pa.Table:
    """The identity of the images, and their scores as numbers: a column for each finding."""
    findings = json.loads((part.schema.metadata or {}).get(schema.FINDINGS_KEY, b"[]"))
    columns: dict[str, Any] = {name: part[name] for name in _IMAGE_COLUMNS}
    there = set(part.column_names)
    if schema.PROBABILITIES in there:
        for number, finding in enumerate(findings):
            value = pc.list_element(part[schema.PROBABILITIES], number)
            columns[PROBABILITY + finding] = pc.if_else(pc.is_nan(value), None, value)
        for number, finding in enumerate(findings):
            value = pc.list_element(part[schema.DECISIONS], number)
            columns[DECISION + finding] = pc.if_else(pc.less(value, 0), None, value)
    if schema.PRED_BOXES in there:
        columns[BOX_COUNT] = pc.list_value_length(part[schema.PRED_BOXES])
        scores = _box_scores(part[schema.PRED_BOXES], findings)
        columns |= {BOX_SCORE + finding: scores[finding] for finding in findings}
        for finding in (name for name in findings if name in box_thresholds):
            reached = pc.greater_equal(scores[finding].cast(pa.float64()), box_thresholds[finding])
            decided = pc.fill_null(reached, False).cast(pa.int8())
            columns[DECISION + finding] = pc.if_else(pc.is_valid(columns[BOX_COUNT]), decided, None)
    for name in part.column_names:
        if name in _NUMBERS:
            value = part[name]
            columns[name] = pc.if_else(pc.is_nan(value), None, value) if pa.types.is_floating(value.type) else value
    if schema.THETA in there:
        columns |= {f"{THETA}{number}": pc.list_element(part[schema.THETA], number) for number in range(6)}
    return pa.table(columns)


def _box_scores(boxes: pa.ChunkedArray, findings: Sequence[str]) -> dict[str, pa.Array]:
    """For each finding, the highest score of its boxes in each image; null without such a box."""
    lists = boxes.combine_chunks()
    entries = pc.list_flatten(lists)
    image = pc.list_parent_indices(lists).to_numpy()
    finding = pc.index_in(pc.struct_field(entries, schema.LABEL), pa.array(findings, pa.string()))
    known = finding.is_valid().to_numpy(zero_copy_only=False)
    best = np.full((len(findings), len(boxes)), -np.inf, np.float32)
    scores = pc.struct_field(entries, schema.SCORE).to_numpy(zero_copy_only=False)
    np.maximum.at(best, (finding.fill_null(0).to_numpy()[known], image[known]), scores[known])
    return {name: pa.array(row, mask=np.isneginf(row)) for name, row in zip(findings, best, strict=True)}


# ---- Studies and patients


def _combined(images: Iterator[pa.Table], per: Per) -> Iterator[pa.Table]:
    """Rows per study or patient, sorted by its id; in a very large run, sorted within each of 64 blocks."""
    column = schema.STUDY_ID if per == "study" else schema.PATIENT_ID
    count = known = 0
    with tempfile.TemporaryDirectory(prefix="cxr-export-") as folder:
        files: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        with ExitStack() as closing:
            for table in _joined(images):
                if any(name.startswith(THETA) for name in table.column_names):
                    raise UserError(
                        f"expected scores that can be combined per {per}, got those of an aligner: export them per "
                        f"image"
                    )
                count, known = count + table.num_rows, known + table.num_rows - table[column].null_count
                keyed = table.append_column(_KEY, _keys(table, per)).append_column(_FRONTAL, _frontal(table))
                bucket_N = np.array(
                    [zlib.crc32(key.encode()) % _BUCKETS for key in keyed[_KEY].to_pylist()], np.int64
                )
                for bucket in np.unique(bucket_N).tolist():
                    rows = keyed.filter(pa.array(bucket_N == bucket))
                    if bucket not in files:
                        sink = closing.enter_context(pa.OSFile(str(Path(folder, f"{bucket:02d}.arrow")), "wb"))
                        files[bucket] = closing.enter_context(pa.ipc.new_stream(sink, rows.schema))
                    files[bucket].write_table(rows)
        if per == "study" and not known:
            raise UserError(f"none of {count:,} images has a study: export scores per image or per patient")
        buckets = sorted(files)
        for block in [buckets] if count <= _SORTED_ROWS else [[bucket] for bucket in buckets]:
            paths = [Path(folder, f"{bucket:02d}.arrow") for bucket in block]
            yield _groups(pa.concat_tables(pa.ipc.open_stream(path.read_bytes()).read_all() for path in paths), per)


def _joined(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of `_SPLIT_ROWS` or a little more."""
    joined: list[pa.Table] = []
    for table in tables:
        joined.append(table)
        if sum(each.num_rows for each in joined) >= _SPLIT_ROWS:
            yield pa.concat_tables(joined).combine_chunks()
            joined = []
    if joined:
        yield pa.concat_tables(joined).combine_chunks()


def _keys(table: pa.Table, per: Per) -> pa.ChunkedArray:
    """(N,) ids of groups; studies of different patients differ. An image whose group is unknown is one of its own,
    after all others."""
    group = patient = table[schema.PATIENT_ID]
    if per == "study":  # null where the study is
        group = pc.binary_join_element_wise(table[schema.STUDY_ID], pc.fill_null(patient, ""), "\0")
    return pc.coalesce(group, pc.binary_join_element_wise("\uffff", table[schema.IMAGE_ID], ""))


def _frontal(table: pa.Table) -> pa.Array:
    """(N,) whether each image is frontal: by the gate's verdict, else unless its codes rule it out."""
    codes = (table[name].to_pylist() for name in (schema.GATE, schema.VIEW, schema.BODY_PART, schema.MODALITY))
    return pa.array(
        [
            verdict == gate.FRONTAL if verdict else gate.header_verdict(*header) is None
            for verdict, *header in zip(*codes, strict=True)
        ],
        pa.bool_(),
    )


def _groups(images: pa.Table, per: Per) -> pa.Table:
    """One row per key."""
    images = images.sort_by([(_KEY, "ascending"), (schema.IMAGE_ID, "ascending")]).combine_chunks()
    keys, ids = images[_KEY].to_numpy(), images[schema.IMAGE_ID]
    first = np.concatenate([[True], keys[1:] != keys[:-1]])
    group, starts = np.cumsum(first) - 1, np.flatnonzero(first)
    error = images[schema.ERROR].is_valid().to_numpy()
    used = images[_FRONTAL].to_numpy() & ~error

    def sums(values_N: np.ndarray) -> pa.Array:
        return pa.array(np.add.reduceat(values_N.astype(np.int64), starts))

    def best(name: str) -> pa.Array:
        """For each group, the row with the largest value in the column among the images in use; null without one."""
        value = images[name].cast(pa.float64()).fill_null(-np.inf).to_numpy()
        value = np.where(used, value, -np.inf)
        order = np.lexsort((-np.arange(len(value)), value, group))  # of equal values, the first image's
        rows = order[np.append(starts[1:], len(value)) - 1]
        return pa.array(rows, mask=np.isneginf(value[rows]))

    start = pa.array(starts)
    columns: dict[str, Any] = {}
    if per == "study":
        columns[schema.STUDY_ID] = images[schema.STUDY_ID].take(start)
    columns |= {name: images[name].take(start) for name in (schema.PATIENT_ID, schema.SPLIT, schema.SEX)}
    columns |= {"images": sums(np.ones(len(keys))), "frontal_images": sums(used), "errors": sums(error)}
    for name in images.column_names:
        kind, slash, of = name.partition("/")
        if (kind := kind + slash) in _IMAGE_OF:
            rows = best(name)
            columns[name] = images[name].take(rows)
            columns[_IMAGE_OF[kind] + of] = ids.take(rows)
        elif kind == DECISION:
            columns[name] = images[name].take(best(name))
        elif name == BOX_COUNT:
            columns[name] = sums(np.where(used, images[name].fill_null(0).to_numpy(), 0))
        elif name in _NUMBERS:
            rows = best(name)
            columns[name] = images[name].take(rows)
            if name == schema.PRED_MASK_AREA_PX:
                columns[MASK_IMAGE] = ids.take(rows)
    return pa.table(columns)
