"""What is new in an archive, compared with the images that a run has scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.inference.latents import Origin
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION

KNOWN = pa.schema(
    [
        (schema.IMAGE_ID, pa.string()),
        (schema.SOURCE_URI, pa.string()),
        (FILE_BYTES, pa.int64()),
        (FILE_VERSION, pa.string()),
    ]
)
MOVED = pa.schema(
    [*KNOWN, *(schema.MANIFEST.field(n) for n in (schema.PATIENT_ID, schema.STUDY_ID, schema.SERIES_ID))]
)


@dataclass(frozen=True)
class Listing:
    """The images of an archive as they are now.

    Args:
        rows: its manifest with the columns FILE_BYTES and FILE_VERSION; of shards, `inference.plan.SHARD_PARTS`.
        ids_identify_files: an image's id says which file it is, wherever the file lies: the SOPInstanceUID of DICOM.
        notes: for the user.
    """

    origin: Origin
    rows: pa.Table
    ids_identify_files: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Changes:
    """How archives differ from the images that have been scored."""

    to_score: list[pa.Table]
    """For each archive, the rows of its listing that are new or have changed."""
    new: int
    changed: int
    unchanged: int
    moved: pa.Table
    """MOVED, with the new places of unchanged images."""
    removed: pa.Table
    """KNOWN, with the last known places of images that are no longer there."""

    @property
    def any(self) -> bool:
        return bool(self.new or self.changed or self.moved.num_rows or self.removed.num_rows)


def compare(listings: Sequence[Listing], known: pa.Table) -> Changes:
    """Compare archives with the images that have been scored.

    An image is unchanged if an image with its id, and a file of its size and version, has been scored. Its file may
    have another place by now. Where ids identify files, its version may differ, too, if it has another place. An
    image without a known version has changed.

    Args:
        known: KNOWN, one row for each scored image.
    """
    known_ids = known[schema.IMAGE_ID].combine_chunks()
    to_score, moved, new, changed, unchanged = [], [MOVED.empty_table()], 0, 0, 0
    for listing in listings:
        rows = listing.rows
        row = pc.index_in(rows[schema.IMAGE_ID].combine_chunks(), value_set=known_ids)
        before = known.take(row)

        def same(name: str, rows: pa.Table = rows, before: pa.Table = before) -> pa.ChunkedArray:
            return pc.fill_null(pc.equal(rows[name], before[name]), False)

        same_place = same(schema.SOURCE_URI)
        was_read = before[FILE_VERSION].is_valid()
        any_version = pc.and_(was_read, pc.and_(pa.scalar(listing.ids_identify_files), pc.invert(same_place)))
        same_file = pc.and_(same(FILE_BYTES), pc.or_(same(FILE_VERSION), any_version))
        scored, is_new = rows.filter(pc.invert(same_file)), pc.sum(row.is_null()).as_py() or 0
        to_score.append(scored)
        new, changed = new + is_new, changed + scored.num_rows - is_new
        unchanged += rows.num_rows - scored.num_rows
        moved.append(_conform(rows.filter(pc.and_(same_file, pc.invert(same_place))), MOVED))
    listed = pa.concat_arrays([id_ for each in listings for id_ in each.rows[schema.IMAGE_ID].chunks] or [known_ids])
    removed = known.filter(pc.invert(pc.is_in(known[schema.IMAGE_ID], value_set=listed)))
    return Changes(to_score, new, changed, unchanged, pa.concat_tables(moved), removed)


def _conform(rows: pa.Table, fields: pa.Schema) -> pa.Table:
    """These columns of a listing; null where it lacks one."""
    columns = [rows[f.name] if f.name in rows.column_names else pa.nulls(len(rows), f.type) for f in fields]
    return pa.table(columns, names=fields.names).cast(fields)
