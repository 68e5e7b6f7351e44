"""Known truth that lies beside an archive's images: poses and masks of phantoms, by image id."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema
from cxr.errors import UserError
from cxr.sources.base import Manifest
from cxr.storage import exists, join, read_bytes

TRUTH_FILE = "truth.parquet"  # schema.IMAGE_ID and any of COLUMNS, in the types of schema.MANIFEST
COLUMNS = (schema.POSE_UNIT, schema.MASKS)


def with_truth(manifest: Manifest, uri: str) -> Manifest:
    """The manifest with what `truth.parquet` in the archive's root says of its images; as it is without one.

    Raises:
        UserError: the file is not such a table.
    """
    location = join(uri, TRUTH_FILE)
    if not exists(location):
        return manifest
    table, truth = manifest.table, _read(location)
    rows = pc.index_in(table[schema.IMAGE_ID], value_set=truth[schema.IMAGE_ID])
    for column in truth.column_names[1:]:
        index = table.schema.get_field_index(column)
        table = table.set_column(index, table.schema.field(index), truth[column].take(rows))
    note = f"{TRUTH_FILE} speaks of {len(rows) - rows.null_count:,} of {len(rows):,} images"
    return Manifest(table, manifest.findings, [*manifest.notes, note])


def _read(location: str) -> pa.Table:
    wanted = (schema.IMAGE_ID, *COLUMNS)
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(location)))
        fields = [schema.MANIFEST.field(name) for name in wanted if name in (schema.IMAGE_ID, *table.column_names)]
        return table.select([field.name for field in fields]).cast(pa.schema(fields)).combine_chunks()
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{location} is no table of {', '.join(wanted)} ({error}): mend or remove it") from error
