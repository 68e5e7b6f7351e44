"""Manifest: the result of every source, with one row per image and nothing decoded yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from cxr import schema

_BOXES_FRAME_PX = b"cxr.boxes_frame_px"


@dataclass
class Manifest:
    """An archive's images, the findings of their labels in order, and notes for the user."""

    table: pa.Table  # schema.MANIFEST
    findings: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def boxes_frame_px(self) -> int | None:
        return boxes_frame_px(self.table.schema)

    def print_notes(self) -> None:
        """Print the notes."""
        for note in self.notes:
            print(f"note: {note}", flush=True)


class Source(Protocol):
    """The reader of one archive layout; implemented by modules of this package."""

    @property
    def name(self) -> str: ...

    def detect(self, uri: str) -> bool:
        """Whether the archive has this layout, judging by a few file names, without listing it."""
        ...

    def manifest(self, uri: str) -> Manifest:
        """List every image of the archive exactly once.

        Raises:
            UserError: the layout's lists cannot be read, or there are no images.
        """
        ...


def manifest_table(columns: Mapping[str, pa.Array | pa.ChunkedArray], frame_px: int | None = None) -> pa.Table:
    """A table with `schema.MANIFEST` from some of its columns; the others are null.

    `frame_px` is stored in its metadata and read by `boxes_frame_px`.
    """
    rows = len(columns[schema.IMAGE_ID])
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(rows, field.type)
        for field in schema.MANIFEST
    ]
    metadata = {_BOXES_FRAME_PX: str(frame_px)} if frame_px else None
    return pa.table(arrays, schema=schema.MANIFEST.with_metadata(metadata))


def replace_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with other values in a column, of the same type."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


def boxes_frame_px(manifest_schema: pa.Schema) -> int | None:
    """Side of the square image to which a manifest's boxes and spacing refer, regardless of the files' size.

    None: they refer to each file's own pixels, except for images with their own `schema.BOXES_FRAME`; see
    `frame_scales`.
    """
    side = (manifest_schema.metadata or {}).get(_BOXES_FRAME_PX)
    return int(side) if side else None


def frame_scales(
    own_frame_px: Sequence[int] | None, side_px: int | None, height_px: int, width_px: int
) -> tuple[float, float]:
    """Factors in x and y from boxes in the manifest to pixels of the file; divide the spacing by them.

    Args:
        own_frame_px: the image's `schema.BOXES_FRAME`, [height, width].
        side_px: `boxes_frame_px` of its manifest.
        height_px, width_px: size of the file's image.
    """
    height, width = own_frame_px or ((side_px, side_px) if side_px else (height_px, width_px))
    return width_px / width, height_px / height


def labels_column(labels_NC: np.ndarray) -> pa.ListArray:
    """Column `labels` from int8 (N, findings)."""
    rows, findings = labels_NC.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * findings
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(labels_NC.reshape(-1), pa.int8()))
