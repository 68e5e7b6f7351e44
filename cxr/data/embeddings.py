"""Stored embeddings: one vector per image, written beside the scores, from which heads are trained in seconds.

EMBEDDINGS/part-00003.parquet   SCHEMA; the images of one part of scores that have no error
EMBEDDINGS/embeddings.json      the network that made them and the scored archives; written last

A vector is a binary value of float16 numbers. Parquet files of these are read at the speed of copying memory, 10 to
20 times as fast as lists of float16 (PyArrow 26).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data.run_ledger import read_ledger
from cxr.errors import UserError

FOLDER, ABOUT = "embeddings", "embeddings.json"
KIND, VERSION = "cxr-embeddings", 1
IDENTITY = (schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT)
_THREADS = 8


@dataclass(frozen=True)
class Embeddings:
    """All vectors of a scoring run, or of several side by side, in memory."""

    image_ids: pa.ChunkedArray
    vectors: np.ndarray
    """(N, D) float16."""


def write_part(folder: str, part: str, rows: pa.Table, vectors_BD: np.ndarray) -> None:
    """Write the vectors of a part of scores, such as "scores/part-00003".

    Args:
        rows: IDENTITY of the images; other columns are ignored.
        vectors_BD: float32; values that float16 cannot represent are stored as its largest.
    """
    largest = np.finfo(np.float16).max
    stored = np.ascontiguousarray(vectors_BD.clip(-largest, largest), np.float16)
    count, width = stored.shape
    column = pa.Array.from_buffers(pa.binary(2 * width), count, [None, pa.py_buffer(stored)])
    table = pa.table({name: rows[name] for name in IDENTITY} | {schema.EMBEDDING: column})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="none",  # float16 vectors hardly shrink
        use_dictionary=list(IDENTITY),  # pyright: ignore[reportArgumentType]
        write_statistics=[schema.IMAGE_ID],  # pyright: ignore[reportArgumentType]
    )
    storage.write_bytes(storage.join(folder, part_name(part)), sink.getvalue())


def part_name(part: str) -> str:
    """File name of the vectors of a part of scores."""
    return f"{part.rpartition('/')[2]}.parquet"


def finish(folder: str, parts: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write embeddings.json after all parts have been written.

    Args:
        parts: names of the scored parts. They determine which vectors must exist.
        about: `checkpoint`, its `sha256`, and `archives`.

    Raises:
        UserError: the vectors of a part are missing although its scores exist.
    """
    existing = {entry.path for entry in storage.list_files(folder)} if parts else set()
    names = [part_name(part) for part in parts]
    for name in names:
        if name not in existing:
            raise UserError(
                f"{storage.join(folder, name)} is missing: restore it, or score the archive again into an empty --out"
            )
    storage.write_json(storage.join(folder, ABOUT), {"kind": KIND, "version": VERSION, **about, "parts": names})


def read_about(run: str) -> dict[str, Any]:
    """The contents of embeddings.json of a scoring run.

    Raises:
        UserError: there are no complete embeddings.
    """
    uri = storage.join(run, FOLDER, ABOUT)
    if not storage.exists(uri):
        raise UserError(
            f"expected embeddings in {run}, got no {FOLDER}/{ABOUT}: use the --out of a finished "
            f"`cxr score --save-embeddings`"
        )
    about = storage.read_json(uri)
    if (about.get("kind"), about.get("version")) != (KIND, VERSION):
        raise UserError(
            f"{uri}: expected {KIND!r} version {VERSION}, got {about.get('kind')!r} version {about.get('version')}: "
            f"use the version of cxr that wrote it, or score again"
        )
    return about


def folders(runs: Sequence[str]) -> list[str]:
    """The folders with embeddings of scoring runs: OUT, or of a panel OUT/MEMBER for each member that has some.

    Raises:
        UserError: a run has none.
    """
    found = []
    for run in runs:
        members = [name for name in _members(run) if storage.exists(storage.join(run, name, FOLDER, ABOUT))]
        found += [storage.join(run, name) for name in members] or [run]
    for folder in found:
        read_about(folder)
    return found


def _members(run: str) -> list[str]:
    latest = read_ledger(run).latest
    return latest.settings.get("panel", []) if latest else []


def load_together(runs: Sequence[str]) -> Embeddings:
    """The vectors of several runs side by side, of the images that all have embedded."""
    first, *others = (load(run) for run in runs)
    for other in others:
        rows = pc.index_in(first.image_ids, value_set=other.image_ids)
        known_N = rows.is_valid().to_numpy(zero_copy_only=False)
        vectors = first.vectors[known_N], other.vectors[rows.drop_null().to_numpy()]
        first = Embeddings(first.image_ids.filter(pa.array(known_N)), np.concatenate(vectors, axis=1))
    return first


def load(run: str) -> Embeddings:
    """Read all vectors of a scoring run: 2 GB for a million vectors of 1024 numbers."""
    uris = [storage.join(run, FOLDER, name) for name in read_about(run)["parts"]]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(storage.read_parquet, uris))
    ids = pa.chunked_array([chunk for table in tables for chunk in table[schema.IMAGE_ID].chunks], pa.string())
    width = next((table.schema.field(schema.EMBEDDING).type.byte_width // 2 for table in tables if len(table)), 0)
    vectors_ND, end = np.empty((len(ids), width), np.float16), len(ids)
    while tables:  # each table is freed once it is copied
        table = tables.pop()
        for chunk in filter(len, reversed(table[schema.EMBEDDING].chunks)):
            flat = np.frombuffer(chunk.buffers()[1], np.float16)[chunk.offset * width :]
            vectors_ND[end - len(chunk) : end] = flat[: len(chunk) * width].reshape(len(chunk), width)
            end -= len(chunk)
    return Embeddings(ids, vectors_ND)
