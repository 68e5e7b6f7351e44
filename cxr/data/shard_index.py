"""The index of shards: one small file that says where each image is, and has its patient and labels.

OUT/index.parquet   rows of INDEX; those of a split are in the order of its shard files. Rejects are not in it

Folds, sampling, checks of ids and reports read it instead of columns of every shard file. To find an image, take its
`part`, a path relative to the shards, and its `row` in that file: `find_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data.prefetch import read_ahead
from cxr.data.shards import INDEX_FILE, REJECTS_FILE, IndexFile, ShardInfo, aligned_labels, file_uri, joined_archives
from cxr.errors import UserError
from cxr.storage.files import atomic_writer
from cxr.wording import counted

PART, ROW = "part", "row"
IMAGE_COLUMNS = (schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.LABELS)
INDEX = pa.schema([*(schema.MANIFEST.field(name) for name in IMAGE_COLUMNS), (PART, pa.string()), (ROW, pa.int32())])

_GROUP_ROWS = 1 << 16  # in a row group; 1 MiB with the labels of 14 findings
_AHEAD = 4  # row groups that are read at a time


def write_index(shards: str, parts: Iterable[tuple[str, pa.Table]]) -> None:
    """Write the index of the shards at a URI.

    Args:
        parts: path of each shard file relative to the shards, and the IMAGE_COLUMNS of its rows, in order; columns
            that are missing become null.
    """
    waiting = INDEX.empty_table()
    with (
        atomic_writer(storage.join(shards, INDEX_FILE)) as stream,
        pq.ParquetWriter(stream, INDEX, compression="zstd") as writer,
    ):
        for path, rows in parts:
            rows = rows.select([name for name in IMAGE_COLUMNS if name in rows.column_names])
            rows = rows.append_column(PART, pa.array([path] * rows.num_rows, pa.string()))
            rows = rows.append_column(ROW, pa.array(range(rows.num_rows), pa.int32()))
            waiting = pa.concat_tables([waiting, schema.conform_to_schema(rows, INDEX)])
            if waiting.num_rows >= _GROUP_ROWS:
                writer.write_table(waiting)
                waiting = INDEX.empty_table()
        writer.write_table(waiting)


def read_index(info: ShardInfo, columns: Sequence[str]) -> Iterator[tuple[IndexFile, pa.Table]]:
    """These columns of the index of shards, some ten thousand rows at a time, with the index that they are from."""
    for index in info.indexes:
        uri, reader = storage.join(index.shards, INDEX_FILE), storage.RowGroupReader()
        groups = range(storage.read_parquet_footer(uri).num_row_groups)
        for rows in read_ahead(lambda group, uri=uri, read=reader.read: read(uri, group, columns), groups, _AHEAD):
            yield index, rows


def read_labels(
    info: ShardInfo, splits: Sequence[str], findings: Sequence[str], *, patients: bool = False
) -> tuple[np.ndarray, pa.ChunkedArray]:
    """The labels of the images of these splits, (N, findings) int8, split by split in the order of the shard files.

    Args:
        patients: also return the N patient ids, see `schema.patients_of`; otherwise an empty array.
    """
    rows = [info.rows(split) for split in splits]
    ends = dict(zip(splits, np.cumsum([0, *rows]).tolist(), strict=False))  # of what has been read of each split
    labels = np.full((sum(rows), len(findings)), schema.UNKNOWN, np.int8)
    ids: dict[str, list[pa.ChunkedArray]] = {split: [] for split in splits}
    names = [schema.SPLIT, schema.LABELS, *((schema.IMAGE_ID, schema.PATIENT_ID) if patients else ())]
    for index, table in read_index(info, names):
        for split in splits:
            own = table.filter(pc.equal(table[schema.SPLIT], split))
            start, ends[split] = ends[split], ends[split] + own.num_rows
            labels[start : ends[split]] = aligned_labels(own[schema.LABELS], index.findings, findings)
            if patients:
                ids[split].append(schema.patients_of(own))
    chunks = [chunk for split in splits for column in ids[split] for chunk in column.chunks]
    return labels, pa.chunked_array(chunks, pa.string())


def find_rows(info: ShardInfo, image_ids: Iterable[str]) -> dict[str, tuple[str, int]]:
    """URI of the shard file of each of these images, and the image's row in it; images without pixels are left out.

    The row group is `row // info.row_group_rows`.
    """
    expected, found = pa.array(list(image_ids), pa.string()), dict[str, tuple[str, int]]()
    for index, table in read_index(info, [schema.IMAGE_ID, PART, ROW]):
        for row in table.filter(pc.is_in(table[schema.IMAGE_ID], value_set=expected)).to_pylist():
            found[row[schema.IMAGE_ID]] = file_uri(index.shards, row[PART]), row[ROW]
    return found


def image_ids(info: ShardInfo) -> Iterator[pa.ChunkedArray]:
    """The ids of all images, including those that ingest rejected."""
    for _, rows in read_index(info, [schema.IMAGE_ID]):
        yield rows[schema.IMAGE_ID]
    if info.rejects:
        rejects = storage.read_parquet(storage.join(info.uri, REJECTS_FILE), columns=[schema.IMAGE_ID])
        yield rejects[schema.IMAGE_ID]


def check_ids(info: ShardInfo) -> None:
    """Raise UserError if combined shards have an image id in common: scores are identified by the image id.

    Training on such shards is fine.
    """
    if joined_archives(info.uri):
        check_unique(image_ids(info), f"the archives combined in {info.uri}")


def check_unique(ids: Iterable[pa.ChunkedArray], archives: str) -> None:
    """Raise UserError if an image id occurs more than once in the archives that `archives` describes."""
    every = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
    if pc.count_distinct(every).as_py() == len(every):
        return
    counts = every.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise UserError(
        f"expected different image ids in {archives}, got {counted(len(repeated), 'id')} in common, for example "
        f"{repeated[0].as_py()!r}: score and evaluate each archive separately, or rename the images of one"
    )
