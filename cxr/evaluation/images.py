"""Images to show in a report, from a raw archive or from shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode_pool import decode_image
from cxr.errors import ImageRejectedError
from cxr.imaging import geometry
from cxr.imaging.decode import check_head
from cxr.imaging.geometry import ResizeTransform
from cxr.imaging.image import to_bits

PICTURE_PX = 512  # width and height of the pictures of original images


@dataclass(frozen=True)
class TruthImages:
    """The images of a ground truth, by row.

    Args:
        table: `image_id` and `source_uri`; with shards also `resize_transform`.
        stored: shards that may contain the images.
    """

    table: pa.Table
    stored: Sequence[shards.ShardInfo] = ()

    def ids(self, rows: np.ndarray) -> list[str]:
        return self.table[schema.IMAGE_ID].take(pa.array(rows)).to_pylist()

    def source(self, row: int) -> str:
        """The URI of the original; empty if unknown."""
        return self.table[schema.SOURCE_URI][row].as_py() or ""

    def pictures(self, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
        """See `read_pictures`."""
        return read_pictures(self.table, rows, self.stored)


def read_pictures(
    table: pa.Table, rows: Sequence[int], stored: Sequence[shards.ShardInfo]
) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
    """Pictures (S, S) in [0, 1] by row, and the transform from their pixels to the original image's.

    They come from the shards if these have at least `PICTURE_PX` pixels, otherwise from the originals if they can
    still be read, otherwise from the shards. Images that are in neither are left out.

    Args:
        table: `image_id` and `source_uri`; with shards also `resize_transform`.
        stored: shards that may contain the images.
    """
    large = [info for info in stored if info.pixels.size >= PICTURE_PX]
    small = [info for info in stored if info.pixels.size < PICTURE_PX]
    shown: dict[int, tuple[np.ndarray, ResizeTransform]] = {}
    for read in (*(partial(_stored, info) for info in large), _decoded, *(partial(_stored, info) for info in small)):
        missing = [row for row in rows if row not in shown]
        shown |= read(table, missing) if missing else {}
    return shown


def _decoded(table: pa.Table, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
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


def _stored(
    info: shards.ShardInfo, table: pa.Table, rows: Sequence[int]
) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
    """Pictures of the stored pixels of shards."""
    row_of = {table[schema.IMAGE_ID][row].as_py(): row for row in rows}
    shown = {}
    for part in (part for parts in info.parts.values() for part in parts):
        ids = storage.read_parquet(part.uri, columns=[schema.IMAGE_ID])[schema.IMAGE_ID]
        for at in np.flatnonzero(pc.is_in(ids, value_set=pa.array(row_of, ids.type))).tolist():
            row = row_of[ids[at].as_py()]
            if (transform := table[schema.RESIZE_TRANSFORM][row].as_py()) is not None:
                shown[row] = _pixels(info, part.uri, at), ResizeTransform(**transform)
    return shown


def _pixels(info: shards.ShardInfo, uri: str, at: int) -> np.ndarray:
    group, inside = divmod(at, info.row_group_rows)
    column = storage.read_parquet(uri, row_groups=[group], columns=[schema.PIXELS])[schema.PIXELS]
    pixels = schema.pixels_array(column.slice(inside, 1), info.pixels)[0]
    return to_bits(pixels, 8) / np.float32(255)
