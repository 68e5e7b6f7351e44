"""The stored plans of a scoring run's increments, so that only names of parts pass through Ray.

OUT/increments/0001/plan-00-00000.parquet   images of an archive that the increment scores: rows of its manifest,
                                            sizes and versions of their files; one row group for each part
OUT/increments/0001/moved.parquet           images whose file has another place but the same content
OUT/increments/0001/removed.parquet         images that are no longer in the archive
OUT/increments/0001/left.json               parts that --until left, and images whose file could not be read

An open increment is resumed from its plan, so it does not matter whether the archive has changed in the meantime. The
plans of the committed increments together say which version of each image has been scored.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data import ledger
from cxr.data.identity import COLUMNS, Identity
from cxr.data.manifest_files import by_file, file_of
from cxr.data.run_ledger import REMOVED, UNFINISHED, Generation, Increment, moved_file, removed_file
from cxr.inference.increments import KNOWN, Changes
from cxr.inference.latents import Origin
from cxr.inference.read import ORIGIN_KEY, PART_ROWS, PARTS_KEY
from cxr.sources.image_files import FILE_VERSION

_PLAN, _LEFT = "plan-", "left.json"
_MOVED, _REMOVED = "moved.parquet", "removed.parquet"  # without pseudonyms, _MOVED is that of `moved_file`
_THREADS = 8


@dataclass(frozen=True)
class PlannedPart:
    """A part of an increment, whose rows are a row group of a stored plan."""

    number: int
    """In its increment, from 0."""
    name: str
    """Path of its file of scores in OUT, until the increment is committed; without the suffix."""
    images: int
    plan: str
    """URI of the file."""
    row_group: int


@dataclass(frozen=True)
class StoredPlan:
    """The parts of an increment that are images of one archive."""

    origin: Origin
    parts: list[PlannedPart]


@dataclass(frozen=True)
class Left:
    """What a committed increment has planned but not scored."""

    parts: list[int] = field(default_factory=list)
    """Numbers of parts that --until left."""
    unread: list[tuple[int, int]] = field(default_factory=list)
    """Images whose file could not be read: numbers of their part, and of their row in it."""


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

    def write(self, number: int, plans: Iterable[tuple[Origin, pa.Table, int]]) -> None:
        """Store what an increment scores: for each archive its images, and how many of them make a part.

        Replaces what a run has stored for this number that was killed before the ledger listed it.

        Raises:
            UserError: an image id occurs more than once in an archive.
        """
        storage.delete(self._of(number))
        first = 0
        for index, (origin, rows, rows_per_part) in enumerate(plans):
            parts = ledger.plan(rows, rows_per_part) if rows.num_rows else iter(())
            for file, of_file in enumerate(by_file(parts)):
                uri = storage.join(self._of(number), f"{_PLAN}{index:02d}-{file:05d}.parquet")
                self._write(uri, [part.rows for part in of_file], origin, first)
                first += len(of_file)

    def _write(self, uri: str, parts: Sequence[pa.Table], origin: Origin, first: int) -> None:
        listed = [[first + n, _images(rows)] for n, rows in enumerate(parts)]
        about = {ORIGIN_KEY: json.dumps(asdict(origin)), PARTS_KEY: json.dumps(listed)}
        fields = parts[0].schema.with_metadata({**(parts[0].schema.metadata or {}), **about})
        storage.write_bytes(uri, file_of(parts, fields), private=self.identity is not None)

    def read(self, number: int) -> list[StoredPlan]:
        """The plan of an increment, by archive; archives of which it scores nothing are left out."""
        plans: dict[str, StoredPlan] = {}
        uris = self._files(number)
        with ThreadPoolExecutor(_THREADS) as pool:
            for uri, footer in zip(uris, pool.map(storage.read_parquet_footer, uris), strict=True):
                origin = json.loads(footer.metadata[ORIGIN_KEY])
                plan = plans.setdefault(
                    origin["archive"],
                    StoredPlan(Origin(origin["archive"], origin["source"], tuple(origin["findings"])), []),
                )
                for row_group, (part, images) in enumerate(json.loads(footer.metadata[PARTS_KEY])):
                    plan.parts.append(PlannedPart(part, part_name(number, part), images, uri, row_group))
        return list(plans.values())

    def images(self, number: int) -> pa.Table:
        """The ids and paths of the images that an increment scores, as far as its plan has them."""
        tables = [pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri))) for uri in self._files(number)]
        return pa.concat_tables(
            [table.read([n for n in COLUMNS if n in table.schema_arrow.names]) for table in tables],
            promote_options="default",
        )

    def write_departures(self, number: int, changes: Changes) -> None:
        """Store the moved and removed images, also for readers of the results: see `data.run_ledger.current_rows`."""
        if changes.moved.num_rows:
            self._write_rows(storage.join(self._of(number), _MOVED), changes.moved)
            if self.identity:
                self.identity.record(changes.moved)
                storage.write_bytes(moved_file(self.out, number), _parquet(self.identity.applied(changes.moved)))
        if changes.removed.num_rows:
            self._write_rows(storage.join(self._of(number), _REMOVED), changes.removed)
            count = changes.removed.num_rows
            known = {name: changes.removed[name] for name in (schema.IMAGE_ID, schema.SOURCE_URI)}
            known[schema.ERROR] = pa.chunked_array([[REMOVED] * count], pa.string())
            columns = [known.get(field.name, pa.nulls(count, field.type)) for field in schema.SCORES]
            marked = pa.table(columns, schema=schema.SCORES)
            marked = self.identity.applied(marked) if self.identity else marked
            marked = marked.append_column(schema.INCREMENT, pa.array([number] * count, pa.int32()))
            storage.write_bytes(removed_file(self.out, number), _parquet(marked))

    def _write_rows(self, uri: str, rows: pa.Table) -> None:
        storage.write_bytes(uri, _parquet(rows), private=self.identity is not None)

    def write_left(self, number: int, left: Left) -> None:
        """Store what an increment has not scored, before it is committed."""
        content = json.dumps(asdict(left)).encode()
        storage.write_bytes(storage.join(self._of(number), _LEFT), content, private=self.identity is not None)

    def read_left(self, increment: Increment) -> Left:
        """What a committed increment has not scored."""
        if not increment.remaining and not increment.unread:
            return Left()
        content = storage.read_json(storage.join(self._of(increment.number), _LEFT))
        return Left(content["parts"], [(part, row) for part, row in content["unread"]])

    def known(self, generation: Generation, *, retry: bool) -> pa.Table:
        """The images that the committed increments of a generation have scored and not marked as removed: KNOWN.

        Args:
            retry: images whose file could not be read have no version, so that they count as changed.
        """

        def read(increment: Increment) -> tuple[pa.Table, pa.ChunkedArray]:
            """The places and versions that an increment recorded, and the ids of the removed images."""
            left = self.read_left(increment)
            left = left if retry else replace(left, unread=[])
            tables = [_known(uri, left) for uri in self._files(increment.number)]
            if increment.moved:
                moved = storage.join(self._of(increment.number), _MOVED)
                tables.append(storage.read_parquet(moved, columns=KNOWN.names).cast(KNOWN))
            removed = KNOWN.empty_table()
            if increment.removed:
                removed = storage.read_parquet(storage.join(self._of(increment.number), _REMOVED))
            return pa.concat_tables([KNOWN.empty_table(), *tables]), removed[schema.IMAGE_ID]

        with ThreadPoolExecutor(_THREADS) as pool:
            increments = list(pool.map(read, generation.increments))
        known = KNOWN.empty_table()
        for recorded, removed in increments:
            outdated = pa.chunked_array([*recorded[schema.IMAGE_ID].chunks, *removed.chunks], pa.string())
            still_valid = pc.invert(pc.is_in(known[schema.IMAGE_ID], value_set=outdated.combine_chunks()))
            known = pa.concat_tables([known.filter(still_valid), recorded])
        return known

    def _of(self, number: int) -> str:
        return storage.join(self.folder, f"{number:04d}")

    def _files(self, number: int) -> list[str]:
        try:
            entries = list(storage.list_files(self._of(number)))
        except storage.NotFoundError:  # an increment that only moved or removed images
            return []
        return sorted(entry.uri for entry in entries if entry.path.startswith(_PLAN))


def part_name(increment: int, part: int) -> str:
    """Path in OUT of a part's scores until its increment is committed, without the suffix."""
    return f"{UNFINISHED}/part-{increment:04d}-{part:05d}"


def _images(rows: pa.Table) -> int:
    """The number of images in a part: its rows, unless they are parts of shards."""
    return sum(rows[PART_ROWS].to_pylist()) if PART_ROWS in rows.column_names else rows.num_rows


def _known(uri: str, left: Left) -> pa.Table:
    """KNOWN of the images in a file of a plan that have been scored."""
    file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri)))
    rows = file.read(KNOWN.names, use_threads=False).select(KNOWN.names).replace_schema_metadata().cast(KNOWN)
    not_scored, unread = set(left.parts), set(left.unread)
    scored, was_read = [], []
    for group, (part, _) in enumerate(json.loads(file.schema_arrow.metadata[PARTS_KEY])):
        count = file.metadata.row_group(group).num_rows
        scored += [part not in not_scored] * count
        was_read += [(part, row) not in unread for row in range(count)]
    versions = pc.if_else(pa.array(was_read, pa.bool_()), rows[FILE_VERSION], pa.scalar(None, pa.string()))
    rows = rows.set_column(KNOWN.get_field_index(FILE_VERSION), KNOWN.field(FILE_VERSION), versions)
    return rows.filter(pa.array(scored, pa.bool_()))


def _parquet(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()
