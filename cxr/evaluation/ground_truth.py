"""What an archive or shards say about their images, to compare scores with. Decodes no pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import shard_index, shards
from cxr.data.identity import read_crosswalk
from cxr.errors import UserError
from cxr.evaluation.run import NoGroundTruthError, no_images
from cxr.sources import open_manifest, selection
from cxr.sources.manifest import Manifest
from cxr.sources.options import SOURCE_LABELS, Labeling, ReadOptions

PLACES = pa.schema([(schema.SHARD_FILE, pa.int32()), (schema.SHARD_ROW, pa.int32())])
"""Columns that say where an image is stored in shards."""
_THREADS = 8
_manifests: ContextVar[dict[tuple[str, ReadOptions, Labeling], Manifest] | None] = ContextVar(
    "_manifests", default=None
)


@contextmanager
def read_once() -> Iterator[None]:
    """In this context, the lists of an archive are read once, and its notes are given once, however many runs are
    compared with it."""
    token = _manifests.set({})
    try:
        yield
    finally:
        _manifests.reset(token)


def _open_manifest(archive: str, reading: ReadOptions, labeling: Labeling) -> Manifest:
    known, key = _manifests.get(), (archive, reading, labeling)
    if known is None:
        return open_manifest(archive, reading, labeling)
    if key in known:
        return replace(known[key], notes=[])
    known[key] = open_manifest(archive, reading, labeling)
    return known[key]


def read_truth(
    archive: str, reading: ReadOptions, split: str, columns: Sequence[str], labeling: Labeling = SOURCE_LABELS
) -> Manifest:
    """These columns, `image_id` first, of an archive's images in `split` ("all" for every image). Decodes no pixels.

    Shards also have the images that ingest rejected, of which only the ids are set, and the columns `shard_file` and
    `shard_row`, which say where an image is stored.

    Raises:
        UserError: there is no such archive, no image in that split, or combined shards share an image id.
    """
    archive = storage.normalize(archive)
    return of_split(read_all_truth(archive, reading, columns, labeling, split), archive, split)


def read_all_truth(
    archive: str,
    reading: ReadOptions,
    columns: Sequence[str],
    labeling: Labeling = SOURCE_LABELS,
    needed: str = "all",
) -> Manifest:
    """Like `read_truth`, for the images of all splits; shards may return only those of `needed`."""
    names = [schema.IMAGE_ID, schema.SPLIT, *columns]
    if shards.is_shards(archive):
        labeling.check_raw(archive)
        known = _of_shards(shards.read_info(archive, latents=True), names, needed, reading.select)
        names += PLACES.names
    else:
        known = _open_manifest(archive, reading, labeling)
    table = known.table.select(names)
    if not reading.crosswalk:
        return Manifest(table, known.findings, known.notes)
    return Manifest(read_crosswalk(reading.crosswalk).pseudonymized(table), known.findings)  # notes can name images


def of_split(known: Manifest, archive: str, split: str) -> Manifest:
    """The images of a split, or of "all".

    Raises:
        UserError: there is none; a NoGroundTruthError if the other splits have no ground truth either.
    """
    if split == "all" and known.table.num_rows:
        return known
    table = known.table.filter(pc.equal(known.table[schema.SPLIT], split))
    if not table.num_rows:
        error = UserError if _has_truth(known.table) else NoGroundTruthError
        raise error(no_images(archive, split, Counter(known.table[schema.SPLIT].to_pylist())))
    return Manifest(table, known.findings, known.notes)


def _has_truth(table: pa.Table) -> bool:
    """Whether any image has a known label, a list of boxes, or a mask. Columns may be missing."""
    there = set(table.column_names)
    labels = pc.list_flatten(table[schema.LABELS]) if schema.LABELS in there else []
    masks = pc.list_flatten(table[schema.MASKS]) if schema.MASKS in there else []
    boxed = schema.BOXES in there and table[schema.BOXES].null_count < table.num_rows
    known = len(labels) > 0 and pc.any(pc.not_equal(labels, schema.UNKNOWN)).as_py()
    return bool(known) or boxed or len(masks) > 0


def patient_numbers(table: pa.Table) -> np.ndarray:
    """(N,) one number per patient, in the order of their ids; see `schema.patients_of`."""
    return np.unique(schema.patients_of(table).to_numpy(), return_inverse=True)[1]


def _of_shards(info: shards.ShardInfo, columns: Sequence[str], split: str, expression: str) -> Manifest:
    """The images of a split, or of all splits if it is empty or "all", and the rejects; only selected ones."""
    read = list(dict.fromkeys([*columns, *(selection.COLUMNS if expression else ())]))
    shard_index.check_ids(info)
    fields = pa.schema([*(schema.row_schema(info.pixels).field(name) for name in read), *PLACES])
    numbers = {file.uri: number for number, file in enumerate(info.files)}

    def read_file(file: shards.ShardFile) -> pa.Table:
        rows = shards.read_rows(file, read, info.findings)
        places = np.full(rows.num_rows, numbers[file.uri]), np.arange(rows.num_rows)
        for field, values in zip(PLACES, places, strict=True):
            rows = rows.append_column(field, pa.array(values, field.type))
        return schema.conform_to_schema(rows, fields)

    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(read_file, info.parts[split] if info.rows(split) else info.files))
    if info.rejects:
        rejects = storage.read_parquet(storage.join(info.uri, shards.REJECTS_FILE), columns=read)
        tables.append(schema.conform_to_schema(rejects, fields))
    table, notes = selection.select(pa.concat_tables(tables), expression, "these shards")
    return Manifest(table.select([*columns, *PLACES.names]), info.findings, notes)
