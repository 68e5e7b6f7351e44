"""Ground truth in an archive's root folder (`truth.parquet`): poses and masks of phantoms, by image id.

A mask is a run-length code or the URI of an image file. A URI without a scheme and a leading slash is relative to the
archive's root. All files must be below that root, so that a table that comes with an archive cannot make a job read
other files. To use your own table with masks elsewhere, set CXR_ALLOW_OUTSIDE_MASKS=1 in the environment of the job.
"""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema
from cxr.errors import UserError
from cxr.sources.label_rows import contradictions_note
from cxr.sources.manifest import Manifest
from cxr.storage import exists, is_inside, join, normalize, read_bytes, resolve
from cxr.wording import counted

TRUTH_FILE = "truth.parquet"  # columns: schema.IMAGE_ID and any of COLUMNS, with the types of schema.MANIFEST
COLUMNS = (schema.TRUE_THETA, schema.MASKS)
ALLOW_OUTSIDE = "CXR_ALLOW_OUTSIDE_MASKS"


def with_truth(manifest: Manifest, uri: str) -> Manifest:
    """Add the columns of `truth.parquet` in the archive's root, if there is one.

    Raises:
        UserError: the file is not such a table, or refers to a mask outside the archive.
    """
    location = join(uri, TRUTH_FILE)
    if not exists(location):
        return manifest
    truth, contradictory = _one_row_per_image(_read(location))
    if schema.MASKS in truth.column_names:
        truth = with_masks_inside(truth, location, normalize(uri))
    table = manifest.table
    rows = pc.index_in(table[schema.IMAGE_ID], value_set=truth[schema.IMAGE_ID])
    for column in truth.column_names[1:]:
        index = table.schema.get_field_index(column)
        table = table.set_column(index, table.schema.field(index), truth[column].take(rows))
    notes = [f"{TRUTH_FILE} covers {len(rows) - rows.null_count:,} of {counted(len(rows), 'image')}"]
    notes += contradictions_note(contradictory, TRUTH_FILE)
    return Manifest(table, manifest.findings, [*manifest.notes, *notes])


def _read(location: str) -> pa.Table:
    data = read_bytes(location)
    columns = (schema.IMAGE_ID, *COLUMNS)
    try:
        table = pq.read_table(pa.BufferReader(data))
        fields = [schema.MANIFEST.field(name) for name in columns if name in (schema.IMAGE_ID, *table.column_names)]
        table = table.select([field.name for field in fields]).cast(pa.schema(fields)).combine_chunks()
        table.validate(full=True)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:  # damaged pages, footers and names included
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{location}: expected a table with the columns {', '.join(columns)}, got an error ({reason}): repair or "
            f"remove it"
        ) from error
    return table


def _one_row_per_image(truth: pa.Table) -> tuple[pa.Table, int]:
    """Merge to one row per image, null where its rows differ; also the number of images whose rows differ."""
    ids = truth[schema.IMAGE_ID]
    if len(ids) == len(ids.unique()):
        return truth, 0
    rows: dict[str, dict] = {}
    contradictory: set[str] = set()
    for row in truth.to_pylist():
        first = rows.setdefault(row[schema.IMAGE_ID], row)
        for column in truth.column_names[1:]:
            if row[column] != first[column]:
                first[column] = None
                contradictory.add(row[schema.IMAGE_ID])
    return pa.Table.from_pylist(list(rows.values()), truth.schema), len(contradictory)


def with_masks_inside(truth: pa.Table, location: str, archive: str) -> pa.Table:
    """Resolve the URIs of masks.

    Raises:
        UserError: a mask is outside the archive, has no label, or has neither a code nor a URI.
    """
    each = pc.list_flatten(truth[schema.MASKS])
    has_label, has_code, has_uri = (
        pc.fill_null(pc.greater(pc.utf8_length(pc.struct_field(each, name)), 0), False)
        for name in (schema.LABEL, schema.MASK_RLE, schema.MASK_URI)
    )
    if not pc.all(pc.and_(has_label, pc.or_(has_code, has_uri)), min_count=0).as_py():
        raise UserError(
            f"{location}: expected a label and either a code or a URI for each mask, got a mask without: add what is "
            "missing, or remove the mask"
        )
    if not pc.any(has_uri, min_count=0).as_py():
        return truth
    masks = truth[schema.MASKS].to_pylist()
    for mask in (mask for of_image in masks for mask in of_image or ()):
        if mask[schema.MASK_URI]:
            mask[schema.MASK_URI] = _resolve(mask[schema.MASK_URI], location, archive)
    index = truth.schema.get_field_index(schema.MASKS)
    return truth.set_column(index, truth.schema.field(index), pa.array(masks, truth.schema.field(index).type))


def _resolve(mask_uri: str, location: str, archive: str) -> str:
    """The absolute URI, without "." and "..", of a mask URI that may be relative to the archive."""
    uri = resolve(mask_uri, archive)
    if not (is_inside(uri, archive) or os.environ.get(ALLOW_OUTSIDE)):
        raise UserError(
            f"{location}: expected masks inside the archive, got {mask_uri[:200]!r}: copy them into the archive, or "
            f"set {ALLOW_OUTSIDE}=1 if you trust this table"
        )
    return uri
