"""The scores of a finished increment in files of at least `FILE_ROWS` images, joined from those of its parts.

Parts are small, so that a run can be killed at any moment and lose little; many small files are slow to read. The
joined files depend only on the parts, so a run that is killed while it joins writes the same files again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data import gate
from cxr.data.decode import is_unread
from cxr.data.ledger import SUFFIX
from cxr.data.prefetch import read_ahead
from cxr.data.run_ledger import Generation, row_groups, score_file
from cxr.imaging import dicom_terms
from cxr.inference.plan_store import PlannedPart, PlanStore
from cxr.storage.files import atomic_writer

FILE_ROWS = 100_000  # of a file, if there are as many; the last one has up to twice as many
_GROUP_ROWS = 4096  # of a row group, which readers hold in memory as a whole
_AHEAD = 8  # parts, or row groups, that are read at a time
_CODES = (schema.VIEW, schema.BODY_PART, schema.MODALITY)
_COUNTED = pa.schema([schema.SCORES.field(n) for n in (schema.ERROR, schema.GATE, *_CODES)])
"""The columns of scores that `ScoreCounts` counts."""


@dataclass
class ScoreCounts:
    """Counts over the written parts of a run."""

    reasons: Counter[str] = field(default_factory=Counter)
    not_frontal_chest: Counter[str] = field(default_factory=Counter)

    def add(self, part: pa.Table) -> None:
        """Add a part's scores; for images that the gate has not checked, the codes of DICOM headers count."""
        rows = schema.conform_to_schema(part.select([n for n in _COUNTED.names if n in part.column_names]), _COUNTED)
        self.reasons.update(pc.drop_null(rows[schema.ERROR]).to_pylist())
        self.not_frontal_chest.update(gate.not_frontal(rows[schema.GATE]))
        unchecked = rows.filter(rows[schema.GATE].is_null())
        codes = (unchecked[name].to_pylist() for name in _CODES)
        self.not_frontal_chest += dicom_terms.other_than_frontal_chest(*codes)


@dataclass
class Joined:
    """The files of an increment, and what is in them."""

    files: int = 0
    counts: ScoreCounts = field(default_factory=ScoreCounts)
    unread: list[tuple[int, int]] = field(default_factory=list)
    """See `plan_store.Left`."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each file, by its URI."""


def join_parts(out: str, number: int, parts: Sequence[PlannedPart]) -> Joined:
    """Write the files of an increment from those of these parts, which are left in place."""
    joined = Joined()
    for group in _groups(parts):
        uri = score_file(out, number, joined.files)
        with atomic_writer(uri) as stream:
            hashed = _Hashed(stream)
            _join(out, group, hashed, joined)
        joined.sha256[uri] = hashed.digest.hexdigest()
        joined.files += 1
    return joined


def _groups(parts: Sequence[PlannedPart]) -> Iterator[list[PlannedPart]]:
    """The parts of each file."""
    group, rows, left = [], 0, sum(part.images for part in parts)
    for part in parts:
        group.append(part)
        rows += part.images
        if rows >= FILE_ROWS and left - rows >= FILE_ROWS:
            yield group
            group, rows, left = [], 0, left - rows
    if group:
        yield group


def _join(out: str, parts: Sequence[PlannedPart], stream: _Hashed, joined: Joined) -> None:
    tables, writer = list[pa.Table](), None
    uris = [storage.join(out, part.name + SUFFIX) for part in parts]
    read = read_ahead(storage.read_parquet, uris, _AHEAD)
    for part, table in zip(parts, read, strict=True):
        joined.counts.add(table)
        errors = enumerate(table[schema.ERROR].to_pylist())
        joined.unread += [(part.number, row) for row, error in errors if error and is_unread(error)]
        writer = writer or pq.ParquetWriter(pa.PythonFile(cast(BinaryIO, stream), "w"), table.schema)
        tables.append(table)
        if sum(each.num_rows for each in tables) >= _GROUP_ROWS:
            writer.write_table(pa.concat_tables(tables))
            tables = []
    assert writer
    with writer:
        if tables:
            writer.write_table(pa.concat_tables(tables))


class _Hashed:
    """A stream to write to, with the SHA-256 of what has been written."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def parts_of(
    out: str, generation: Generation, plans: PlanStore, columns: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """The name of each part that a generation has scored, and these columns of its scores, in the plans' order."""
    for increment in generation.increments:
        uris = [score_file(out, increment.number, file) for file in range(increment.files)]
        not_scored = set(plans.read_left(increment).parts)
        groups = read_ahead(
            lambda group: storage.read_parquet(group[0], row_groups=[group[1]], columns=columns),
            row_groups(uris),
            _AHEAD,
        )
        rows: pa.Table | None = None
        for part in (part for plan in plans.read(increment.number) for part in plan.parts):
            if part.number in not_scored:
                continue
            while rows is None or rows.num_rows < part.images:
                rows = next(groups) if rows is None else pa.concat_tables([rows, next(groups)])
            yield part.name, rows.slice(0, part.images)
            rows = rows.slice(part.images)
