"""A list of images: a CSV or Parquet file with one URI per row, given as the archive.

    --archive images.csv

The URI is in the first of the columns `source_uri`, `uri`, `path`, `file`, `image`, `file_name` and `filename`. It
may be a path relative to the list's folder, an absolute path, any URI that `cxr.storage` reads, or a member of a
container (`a.zip!/1.dcm`). Optional columns are `image_id` (default: the URI as it is in the list), `patient_id`,
`study_id`, `series_id`, `view` and `split` (train, val or test). A blank patient counts as a patient of its own, and
images without a split are divided by a hash of the patient.

A list that the user names may refer to any file that the user can read. A list inside a container may refer only to
members of the same container, so that a downloaded container cannot make a job read other files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.csv_table import CsvTable, read_csv
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import SPLIT_WORDS, split_by_patient

name = "list"

URI_COLUMNS = (schema.SOURCE_URI, "uri", "path", "file", "image", "file_name", "filename")
_COPIED = (schema.STUDY_ID, schema.SERIES_ID, schema.VIEW)
_READ = (schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, *_COPIED)
_SUFFIXES = (".csv", ".tsv", ".parquet")


def detect(uri: str) -> bool:
    """Whether the archive's name is that of a CSV or Parquet file."""
    return uri.lower().endswith(_SUFFIXES)


def manifest(uri: str) -> Manifest:
    """List the images; without labels.

    Raises:
        UserError: the list cannot be read, or has no column of URIs, no rows, an unknown split, or different rows
            with the same image id.
    """
    table = _read_parquet(uri) if uri.lower().endswith(".parquet") else read_csv(uri, ())
    uri_column = next((column for column in URI_COLUMNS if column in table), None)
    if uri_column is None:
        columns = ", ".join(map(repr, table.header[:10])) or "none"
        raise UserError(
            f"{uri}: expected one of the columns {', '.join(URI_COLUMNS)}, got {columns}: rename a column"
        )
    if not len(table):
        raise UserError(f"{uri}: expected one image per row, got no rows: add some")
    entries = table.column(uri_column)
    texts = {column: table.column(column) for column in _READ if column in table}
    ids = [given_id or entry for given_id, entry in zip(texts.get(schema.IMAGE_ID, entries), entries, strict=True)]
    uris = _resolved(table, entries)
    rows, repeated = _distinct_rows(table, ids, list(zip(ids, uris, *texts.values(), strict=True)))
    columns = {
        column: pa.array([texts[column][row] or None for row in rows], pa.string())
        for column in _COPIED
        if column in texts
    }
    image_ids = pa.array([ids[row] for row in rows], pa.string())
    patients = texts.get(schema.PATIENT_ID, ids)
    patient_ids = pa.array([patients[row] or ids[row] for row in rows], pa.string())
    splits = _splits(table, rows, patient_ids, texts.get(schema.SPLIT))
    columns |= {
        schema.IMAGE_ID: image_ids,
        schema.PATIENT_ID: patient_ids,
        schema.SPLIT: splits,
        schema.SOURCE_URI: pa.array([uris[row] for row in rows], pa.string()),
        schema.LABELS: labels_column(np.empty((len(rows), 0), np.int8)),
    }
    notes = [f"repeated rows: {repeated:,}; each image is used once"] if repeated else []
    return Manifest(
        manifest_table(columns), (), [*notes, *_patient_notes(patient_ids, splits, schema.PATIENT_ID in texts)]
    )


def _read_parquet(uri: str) -> CsvTable:
    """A Parquet file as a table of text; its rows are numbered as lines from 1."""
    data = storage.read_bytes(uri)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        known = [column for column in file.schema_arrow.names if column.casefold() in (*URI_COLUMNS, *_READ)]
        table = file.read(known)
        columns = [pc.utf8_trim_whitespace(pc.fill_null(table[column].cast(pa.string()), "")) for column in known]
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: expected a Parquet file, got an error ({reason}): write it again") from error
    return CsvTable(uri, known, columns, range(1, table.num_rows + 1))


def _resolved(table: CsvTable, entries: Sequence[str]) -> list[str]:
    """The normal form of each URI."""
    folder = table.location.rpartition("/")[0] or "/"
    container = storage.split_member(table.location)
    uris: list[str] = []
    for row, entry in enumerate(entries):
        if not entry:
            raise table.error(row, "a path or URI", entry)
        if "\\" in entry and "/" not in entry:
            entry = entry.replace("\\", "/")  # saved on Windows
        try:
            uri = storage.resolve(entry, folder)
        except storage.StorageError:
            raise table.error(row, "a local path, file:///path, s3://bucket/key or gs://bucket/key", entry) from None
        if container and not storage.is_inside(uri, f"{container[0]}!"):
            raise table.error(row, "a member of the container that holds the list", entry)
        uris.append(uri)
    return uris


def _distinct_rows(table: CsvTable, ids: Sequence[str], values: Sequence[tuple]) -> tuple[list[int], int]:
    """Indices of the rows without repetitions, and the number of repetitions."""
    first: dict[str, int] = {}
    for row, image_id in enumerate(ids):
        if values[first.setdefault(image_id, row)] != values[row]:
            raise table.error(row, "one row per image", image_id)
    return list(first.values()), len(ids) - len(first)


def _splits(table: CsvTable, rows: Sequence[int], patient_ids: pa.Array, given: Sequence[str] | None) -> pa.Array:
    """The split of each row: the list's, else that of the patient's other images, else by the patient's hash."""
    hashed = split_by_patient(patient_ids)
    if given is None:
        return hashed
    listed: list[str | None] = []
    for row in rows:
        word = given[row].casefold()
        if word and word not in SPLIT_WORDS:
            raise table.error(row, "the split train, val or test", given[row])
        listed.append(SPLIT_WORDS.get(word))
    of_patient = {patient: split for patient, split in zip(patient_ids.to_pylist(), listed, strict=True) if split}
    chosen = [
        split or of_patient.get(patient) for patient, split in zip(patient_ids.to_pylist(), listed, strict=True)
    ]
    return pc.coalesce(pa.array(chosen, pa.string()), hashed)


def _patient_notes(patient_ids: pa.Array, splits: pa.Array, has_patients: bool) -> list[str]:
    if not has_patients:
        return [
            "the list has no patient_id: each image counts as a patient, so images of a person may be in several "
            "splits"
        ]
    pairs = (
        pa.table({"patient": patient_ids, "split": splits})
        .group_by("patient")
        .aggregate([("split", "count_distinct")])
    )
    several = pc.sum(pc.greater(pairs["split_count_distinct"], 1)).as_py() or 0
    return [f"patients that the list puts into several splits: {several:,}"] if several else []
