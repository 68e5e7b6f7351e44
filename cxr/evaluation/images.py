"""Images to show in a report, from a raw archive or from shards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode_pool import decode_image
from cxr.data.shard_index import find_rows
from cxr.errors import ImageRejectedError
from cxr.evaluation.ground_truth import PLACES
from cxr.imaging import geometry
from cxr.imaging.decode import check_head
from cxr.imaging.geometry import ResizeTransform
from cxr.imaging.image import to_bits

PICTURE_PX = 512  # width and height of the pictures of original images
_THREADS = 16

Pictures = dict[int, tuple[np.ndarray, ResizeTransform]]
"""Pictures (S, S) in [0, 1] by row, and the transform from their pixels to the original image's."""


@dataclass(frozen=True)
class TruthImages:
    """The images of a ground truth, by row.

    Args:
        table: `image_id` and `source_uri`; with shards also where the images are stored, see `ground_truth.PLACES`.
        stored: shards that may contain the images.
    """

    table: pa.Table
    stored: Sequence[shards.ShardInfo] = ()

    def ids(self, rows: np.ndarray) -> list[str]:
        return self.table[schema.IMAGE_ID].take(pa.array(rows)).to_pylist()

    def source(self, row: int) -> str:
        """The URI of the original; empty if unknown."""
        return self.table[schema.SOURCE_URI][row].as_py() or ""

    def pictures(self, rows: Sequence[int]) -> Pictures:
        """See `read_pictures`."""
        return read_pictures(self.table, rows, self.stored)


def read_pictures(table: pa.Table, rows: Sequence[int], stored: Sequence[shards.ShardInfo]) -> Pictures:
    """Pictures of some rows.

    They come from the shards if these have at least `PICTURE_PX` pixels, otherwise from the originals if they can
    still be read, otherwise from the shards. Images that are in neither are left out.

    Args:
        table: `image_id` and `source_uri`. It may say where the images are stored, see `ground_truth.PLACES`;
            otherwise the index of the shards is searched.
        stored: shards that may contain the images.
    """
    files = [(info, file) for info in stored for file in info.files]
    places = _places(table, rows, files, stored)
    large = [row for row in places if files[places[row][0]][0].pixels.size >= PICTURE_PX]

    def read(some: Sequence[int]) -> Pictures:
        with ThreadPoolExecutor(_THREADS) as pool:
            read_each = pool.map(lambda row: _stored(*files[places[row][0]], places[row][1]), some)
            return {row: picture for row, picture in zip(some, read_each, strict=True) if picture is not None}

    shown = read(large)
    shown |= _decoded(table, [row for row in rows if row not in shown])
    return shown | read([row for row in places if row not in shown])


def read_stored_row(
    info: shards.ShardInfo, file: shards.ShardFile, row: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """One row of a file of shards, with these columns or all; reads the row group that contains it."""
    group, inside = divmod(row, info.row_group_rows)
    stored = storage.read_parquet(file.uri, row_groups=[group], columns=columns).slice(inside, 1)
    whole = schema.row_schema(info.pixels)
    fields = whole if columns is None else pa.schema([whole.field(name) for name in columns])
    return schema.conform_to_schema(stored, fields)


def _places(
    table: pa.Table,
    rows: Sequence[int],
    files: Sequence[tuple[shards.ShardInfo, shards.ShardFile]],
    stored: Sequence[shards.ShardInfo],
) -> dict[int, tuple[int, int]]:
    """For each row of a table that is in one of the files: the number of the file and the row there."""
    if set(PLACES.names) <= set(table.column_names):
        known = table.select(PLACES.names).take(pa.array(rows, pa.int64())).to_pydict()
        return {
            row: (number, at) for row, number, at in zip(rows, *known.values(), strict=True) if number is not None
        }
    row_of = {table[schema.IMAGE_ID][row].as_py(): row for row in rows}
    number_of = {file.uri: number for number, (_, file) in enumerate(files)}
    return {
        row_of[image_id]: (number_of[uri], at)
        for info in (stored if rows else ())
        for image_id, (uri, at) in find_rows(info, row_of).items()
    }


def _decoded(table: pa.Table, rows: Sequence[int]) -> Pictures:
    """Pictures of the originals; those without a readable one are left out."""
    shown = {}
    for row in rows:
        if not (uri := table[schema.SOURCE_URI][row].as_py()):
            continue
        try:
            fitted = decode_image(storage.read_bytes(uri, check=check_head), PICTURE_PX)
        except (ImageRejectedError, storage.NotFoundError):
            continue
        transform = geometry.fitted_transform(fitted.height, fitted.width, PICTURE_PX)
        shown[row] = to_bits(fitted.image.pixels, 8) / np.float32(255), transform
    return shown


def _stored(info: shards.ShardInfo, file: shards.ShardFile, row: int) -> tuple[np.ndarray, ResizeTransform] | None:
    """The picture of a row of shards; None if its transform is unknown."""
    stored = read_stored_row(info, file, row, [schema.PIXELS, schema.RESIZE_TRANSFORM])
    transform = stored[schema.RESIZE_TRANSFORM][0].as_py()
    if transform is None:
        return None
    pixels = schema.pixels_array(stored[schema.PIXELS], info.pixels)[0]
    return to_bits(pixels, 8) / np.float32(255), ResizeTransform.from_dict(transform)
