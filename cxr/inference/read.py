"""The rows of one part of an archive: what the processes run that read for scoring.

Imports neither torch nor Ray: torch would cost each reading process seconds and hundreds of MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import pyarrow as pa

from cxr import schema, storage
from cxr.data.decode import Content, CropSettings, make_rows
from cxr.imaging.enhance import Enhancement
from cxr.schema import PixelFormat
from cxr.sources.options import GateMode

PART, PART_ROWS = "part", "part_rows"  # columns: name of a row's part, and that part's number of rows
SHARD = "shard"  # column of a part that is a shard file: its URI


@dataclass(frozen=True)
class PartReader:
    """Reads parts of an archive, and decodes them unless they are shard files."""

    pixels: PixelFormat
    crop: CropSettings | None
    enhance: Enhancement | None
    check: GateMode

    def rows(self, part: pa.Table, contents: Sequence[Content | None] | None = None) -> pa.Table:
        """The rows (`schema.row_schema`) of a part: those of its shard file, or the images of its manifest, some of
        which may be in memory (see `data.decode.make_rows`)."""
        if SHARD in part.column_names:
            stored = storage.read_parquet(part[SHARD][0].as_py())
            return schema.conform_to_schema(stored, schema.row_schema(self.pixels))
        crop = self.crop.loaded() if self.crop else None
        return make_rows(part, self.pixels, contents=contents, crop=crop, enhance=self.enhance, check=self.check)

    def labeled_rows(self, part: pa.Table) -> pa.Table:
        """The rows of a part that has the columns PART and PART_ROWS, with these columns."""
        cv2.setNumThreads(0)  # every core has a task of its own
        name, count = part[PART][0].as_py(), part[PART_ROWS][0].as_py()
        rows = self.rows(part.drop_columns([PART, PART_ROWS]))
        assert rows.num_rows == count, f"{name}: planned {count} rows, read {rows.num_rows}"
        rows = rows.append_column(PART, pa.array([name] * count, pa.string()))
        return rows.append_column(PART_ROWS, pa.array([count] * count, pa.int64()))
