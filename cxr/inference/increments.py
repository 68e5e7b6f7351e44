"""Increments of a scoring run: what is new in an archive, the stored plan of an increment, and its commit.

OUT/increments/0001/plan-00.parquet   the images of an archive that the increment scores: rows of its manifest, sizes
                                      and versions of their files, and the number of their part
OUT/increments/0001/moved.parquet     images whose file has another place but the same content
OUT/increments/0001/removed.parquet   images that are no longer in the archive

An open increment is resumed from its plan, so it does not matter whether the archive has changed in the meantime. The
plans of the committed increments together say which version of each image has been scored.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data import ledger
from cxr.data.identity import Identity
from cxr.data.ledger import Part
from cxr.data.run_ledger import REMOVED, Generation, Increment, folder_of, removed_file
from cxr.inference.latents import Origin
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION

_NUMBER = "part_number"
_PLAN = "plan-"  # how names of plans begin
_MOVED, _REMOVED = "moved.parquet", "removed.parquet"
_ORIGIN = b"cxr.origin"
_THREADS = 8
KNOWN = pa.schema(
    [
        (schema.IMAGE_ID, pa.string()),
        (schema.SOURCE_URI, pa.string()),
        (FILE_BYTES, pa.int64()),
        (FILE_VERSION, pa.string()),
    ]
)
LISTED = pa.schema([*schema.MANIFEST, KNOWN.field(FILE_BYTES), KNOWN.field(FILE_VERSION)])


@dataclass(frozen=True)
class Listing:
    """The images of an archive as they are now.

    Args:
        rows: its manifest with the columns FILE_BYTES and FILE_VERSION.
        ids_identify_files: an image's id says which file it is, wherever the file lies: the SOPInstanceUID of DICOM.
    """

    origin: Origin
    rows: pa.Table
    ids_identify_files: bool = False


@dataclass(frozen=True)
class Changes:
    """How archives differ from the images that have been scored."""

    to_score: list[pa.Table]
    """For each archive, the rows of its listing that are new or have changed."""
    new: int
    changed: int
    unchanged: int
    moved: pa.Table
    """KNOWN, with the new places of unchanged images."""
    removed: pa.Table
    """KNOWN, with the last known places of images that are no longer there."""

    @property
    def any(self) -> bool:
        return bool(self.new or self.changed or self.moved.num_rows or self.removed.num_rows)


def compare(listings: Sequence[Listing], known: pa.Table) -> Changes:
    """Compare archives with the images that have been scored.

    An image is unchanged if an image with its id, and a file of its size and version, has been scored. Its file may
    have another place by now. Where ids identify files, its version may differ, too, if it has another place.

    Args:
        known: KNOWN, one row for each scored image.
    """
    known_ids = known[schema.IMAGE_ID].combine_chunks()
    to_score, moved, new, changed, unchanged = [], [KNOWN.empty_table()], 0, 0, 0
    for listing in listings:
        rows = listing.rows
        row = pc.index_in(rows[schema.IMAGE_ID].combine_chunks(), value_set=known_ids)
        before = known.take(row)

        def same(name: str, rows: pa.Table = rows, before: pa.Table = before) -> pa.ChunkedArray:
            return pc.fill_null(pc.equal(rows[name], before[name]), False)

        same_place = same(schema.SOURCE_URI)
        any_version = pc.and_(pa.scalar(listing.ids_identify_files), pc.invert(same_place))
        same_file = pc.and_(same(FILE_BYTES), pc.or_(same(FILE_VERSION), any_version))
        scored, is_new = rows.filter(pc.invert(same_file)), pc.sum(row.is_null()).as_py() or 0
        to_score.append(scored)
        new, changed = new + is_new, changed + scored.num_rows - is_new
        unchanged += rows.num_rows - scored.num_rows
        moved.append(rows.filter(pc.and_(same_file, pc.invert(same_place))).select(KNOWN.names).cast(KNOWN))
    listed = pa.concat_arrays([id_ for each in listings for id_ in each.rows[schema.IMAGE_ID].chunks] or [known_ids])
    removed = known.filter(pc.invert(pc.is_in(known[schema.IMAGE_ID], value_set=listed)))
    return Changes(to_score, new, changed, unchanged, pa.concat_tables(moved), removed)


# ---- Stored plans


@dataclass(frozen=True)
class StoredPlan:
    """The parts of an increment that are images of one archive."""

    origin: Origin
    parts: list[Part]


def divide(rows: pa.Table, number: int, rows_per_part: int, first: int = 0) -> list[Part]:
    """Divide images of an archive into the parts of an increment, whose numbers begin with `first`."""
    parts = ledger.plan(rows, rows_per_part)
    return [Part(f"{folder_of(number)}/part-{first + n:05d}", part.rows) for n, part in enumerate(parts)]


@dataclass(frozen=True)
class PlanStore:
    """The stored plans of a run's increments.

    Args:
        out: URI of the results.
        folder: URI of the plans, which contain ids and paths: OUT/increments, or with pseudonyms a private folder.
        identity: replaces ids and paths in what readers of the results see.
    """

    out: str
    folder: str
    identity: Identity | None = None

    def write(self, number: int, plans: Sequence[StoredPlan], scored: Collection[str] = ()) -> None:
        """Store the parts of an increment, by archive; their rows have the columns FILE_BYTES and FILE_VERSION.

        Replaces what a run has stored for this number that was killed before the ledger listed it. There is a
        complete plan at any moment, so that a run that is killed here does not forget what has been scored.

        Args:
            scored: names of parts that an earlier run has planned in the same way and scored. Their stored rows
                remain, because they say which versions of the files were scored.
        """
        before = {part.name: part for plan in self.read(number) for part in plan.parts if part.name in scored}
        unused = set(self._files(number))
        for index, plan in enumerate(plans):
            if plan.parts:
                uri = storage.join(self._of(number), f"{_PLAN}{index:02d}.parquet")
                self._write_plan(uri, replace(plan, parts=[before.get(part.name, part) for part in plan.parts]))
                unused.discard(uri)
        for uri in unused:
            storage.delete(uri)

    def read(self, number: int) -> list[StoredPlan]:
        """The plan of an increment, by archive; archives of which it scores nothing are left out."""
        return [_read_plan(uri, number) for uri in self._files(number)]

    def shorten(self, number: int, scored: Collection[str]) -> None:
        """Leave only these parts in the plan of an increment, so that the images of all others count as new again."""
        for uri in self._files(number):
            plan = _read_plan(uri, number)
            parts = [part for part in plan.parts if part.name in scored]
            if parts:
                self._write_plan(uri, replace(plan, parts=parts))
            else:
                storage.delete(uri)

    def write_departures(self, number: int, changes: Changes) -> None:
        """Store the moved and removed images, also for readers of the results: see `data.run_ledger.current_rows`."""
        for name, rows in ((_MOVED, changes.moved), (_REMOVED, changes.removed)):
            uri = storage.join(self._of(number), name)  # without pseudonyms, that of _MOVED is `moved_file`
            if rows.num_rows:
                self._write(uri, rows)
            else:
                storage.delete(uri)
        if changes.removed.num_rows:
            count = changes.removed.num_rows
            known = {name: changes.removed[name] for name in (schema.IMAGE_ID, schema.SOURCE_URI)}
            known[schema.ERROR] = pa.chunked_array([[REMOVED] * count], pa.string())
            columns = [known.get(field.name, pa.nulls(count, field.type)) for field in schema.SCORES]
            marked = self._shown(pa.table(columns, schema=schema.SCORES))
            marked = marked.append_column(schema.INCREMENT, pa.array([number] * count, pa.int32()))
            self._write(removed_file(self.out, number), marked)

    def known(self, generation: Generation) -> pa.Table:
        """The images that the committed increments of a generation have scored and not marked as removed: KNOWN."""

        def read(increment: Increment) -> tuple[pa.Table, pa.ChunkedArray]:
            """The places and versions that an increment recorded, and the ids of the removed images."""
            files, folder = self._files(increment.number), self._of(increment.number)
            files += [storage.join(folder, _MOVED)] if increment.moved else []
            tables = [storage.read_parquet(uri, columns=KNOWN.names).cast(KNOWN) for uri in files]
            removed = KNOWN.empty_table()
            if increment.removed:
                removed = storage.read_parquet(storage.join(folder, _REMOVED))
            return pa.concat_tables([KNOWN.empty_table(), *tables]), removed[schema.IMAGE_ID]

        with ThreadPoolExecutor(_THREADS) as pool:
            increments = list(pool.map(read, generation.increments))
        known = KNOWN.empty_table()
        for recorded, removed in increments:
            outdated = pa.chunked_array([*recorded[schema.IMAGE_ID].chunks, *removed.chunks], pa.string())
            still_valid = pc.invert(pc.is_in(known[schema.IMAGE_ID], value_set=outdated.combine_chunks()))
            known = pa.concat_tables([known.filter(still_valid), recorded])
        return known

    def _write_plan(self, uri: str, plan: StoredPlan) -> None:
        table = pa.concat_tables(
            part.rows.append_column(_NUMBER, pa.array([_number(part)] * part.rows.num_rows, pa.int32()))
            for part in plan.parts
        )
        origin = {_ORIGIN: json.dumps(asdict(plan.origin)).encode()}
        self._write(uri, table.replace_schema_metadata({**(table.schema.metadata or {}), **origin}))

    def _write(self, uri: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(uri, sink.getvalue(), private=self.identity is not None)

    def _of(self, number: int) -> str:
        return storage.join(self.folder, f"{number:04d}")

    def _files(self, number: int) -> list[str]:
        try:
            entries = list(storage.list_files(self._of(number)))
        except storage.NotFoundError:  # a run of shards
            return []
        return sorted(entry.uri for entry in entries if entry.path.startswith(_PLAN))

    def _shown(self, rows: pa.Table) -> pa.Table:
        return self.identity.applied(rows) if self.identity else rows


def _read_plan(uri: str, number: int) -> StoredPlan:
    table = storage.read_parquet(uri)
    metadata, numbers = dict(table.schema.metadata), table[_NUMBER]
    origin = json.loads(metadata.pop(_ORIGIN))
    rows = table.drop_columns([_NUMBER]).cast(LISTED.with_metadata(metadata or None))
    parts = [
        Part(f"{folder_of(number)}/part-{each:05d}", rows.filter(pc.equal(numbers, each)))
        for each in sorted(numbers.unique().to_pylist())
    ]
    return StoredPlan(Origin(origin["archive"], origin["source"], tuple(origin["findings"])), parts)


def _number(part: Part) -> int:
    return int(part.name.rpartition("-")[2])
