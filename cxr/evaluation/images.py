"""Images to show in a report, of a raw archive or of shards, by their rows in what is known of them."""

from __future__ import annotations

from collections.abc import Sequence

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

PICTURE_PX = 384  # side of the pictures that are shown of raw archives


def decoded(table: pa.Table, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
    """Pictures (S, S) in [0, 1] by row, and how they lie on the original; images that cannot be had are left out."""
    found = {}
    for row in rows:
        try:
            data = storage.read_bytes(table[schema.SOURCE_URI][row].as_py(), check=check_head)
            fitted = decode_image(data, PICTURE_PX)
        except (ImageRejectedError, storage.NotFoundError):
            continue
        frame = geometry.fitted_transform(fitted.height, fitted.width, PICTURE_PX)
        found[row] = to_bits(fitted.image.pixels, 8) / np.float32(255), frame
    return found


def stored(info: shards.ShardInfo, table: pa.Table, rows: Sequence[int]) -> dict[int, np.ndarray]:
    """Pixels as shards store them, (S, S) in [0, 1], by row of `table`, which names the images."""
    wanted = {table[schema.IMAGE_ID][row].as_py(): row for row in rows}
    found = {}
    for part in (part for parts in info.parts.values() for part in parts):
        ids = storage.read_parquet(part.uri, columns=[schema.IMAGE_ID])[schema.IMAGE_ID]
        for at in np.flatnonzero(pc.is_in(ids, value_set=pa.array(wanted, ids.type))).tolist():
            found[wanted[ids[at].as_py()]] = _pixels(info, part.uri, at)
    return found


def _pixels(info: shards.ShardInfo, uri: str, at: int) -> np.ndarray:
    group, inside = divmod(at, info.row_group_rows)
    column = storage.read_parquet(uri, row_group=group, columns=[schema.PIXELS])[schema.PIXELS]
    pixels = schema.pixels_array(column.slice(inside, 1), info.pixels)[0]
    return to_bits(pixels, 8) / np.float32(255)
