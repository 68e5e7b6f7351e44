"""The rows of one part of an archive: what the processes run that read for scoring.

Imports neither torch nor Ray: torch would cost each reading process seconds and hundreds of MiB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data.decode import Content, Crop, CropSettings, ImageFormat, make_rows_in_formats
from cxr.data.identity import Identity
from cxr.imaging.enhance import Enhancement
from cxr.runtime.step_times import STORAGE, StepTimes
from cxr.schema import PixelFormat
from cxr.sources.options import GateMode

PART, PART_ROWS = "part", "part_rows"  # columns: name of a row's part, and that part's number of rows
TIMES = "times"  # column: seconds that reading the part took, as JSON of `StepTimes`
SHARD = "shard"  # column of a part of shards: the file's URI
ROW_GROUPS = "row_groups"  # column of a part of shards: list of the row groups to read, null for the whole file
ORIGIN_KEY, PARTS_KEY = b"cxr.origin", b"cxr.parts"  # metadata of a file of a plan, see `inference.plan_store`
_PLAN, _ROW_GROUP = "plan", "row_group"  # columns of a key


@dataclass(frozen=True)
class InputFormat:
    """How images reach a network."""

    pixels: PixelFormat
    crop: CropSettings | None = None
    enhance: Enhancement | None = None

    def same_images(self, other: InputFormat) -> bool:
        """Whether images in both formats are identical, wherever the checkpoint lies that crops them."""
        mine, others = ((f.pixels, f.enhance or None, _described(f.crop)) for f in (self, other))
        return mine == others


def _described(crop: CropSettings | None) -> str:
    return json.dumps(crop.describe(), sort_keys=True) if crop else ""


@dataclass(frozen=True)
class PartReader:
    """Reads parts of an archive, and decodes them unless they are shard files."""

    formats: tuple[InputFormat, ...]
    """Of raw images, which are decoded once for all of them; shards have only one."""
    check: GateMode
    identity: Identity | None = None
    """Replaces ids and paths; None keeps them."""
    deadline: float | None = None
    """Seconds since 1970 from which on nothing more is read."""

    def rows(
        self, part: pa.Table, contents: Sequence[Content | None] | None = None, times: StepTimes | None = None
    ) -> pa.Table:
        """The rows of a part: row groups of a shard file, or the images of its manifest, some of which may be in
        memory.

        They have `schema.row_schema`, and further columns if there are several formats; see
        `data.decode.make_rows_in_formats`. `times` gets the time that this takes.
        """
        times = times or StepTimes()
        if SHARD in part.column_names:
            (stored,) = self.formats
            with times.measured(STORAGE):
                rows = storage.read_parquet(part[SHARD][0].as_py(), row_groups=part[ROW_GROUPS][0].as_py())
            return schema.conform_to_schema(rows, schema.row_schema(stored.pixels))
        crops: dict[str, Crop] = {}  # one function for equal crops, so that their regions are computed once
        for settings in filter(None, (one.crop for one in self.formats)):
            if _described(settings) not in crops:
                crops[_described(settings)] = settings.loaded()
        formats = [ImageFormat(f.pixels, crops.get(_described(f.crop)), f.enhance) for f in self.formats]
        return make_rows_in_formats(part, formats, contents=contents, check=self.check, times=times)

    def planned_rows(self, key: pa.Table) -> pa.Table:
        """The rows of the part that a key from `part_key` names, as `labeled_rows` returns them.

        After the deadline, the key is returned as it is; see `is_read`.
        """
        if self.deadline is not None and time.time() >= self.deadline:
            return key
        (each,) = key.to_pylist()
        return self.labeled_rows(each[PART], read_planned(each[_PLAN], each[_ROW_GROUP]), each[PART_ROWS])

    def labeled_rows(self, name: str, part: pa.Table, count: int) -> pa.Table:
        """The rows of a part that has so many images, with the columns PART, PART_ROWS and TIMES."""
        cv2.setNumThreads(0)  # every core has a task of its own
        times = StepTimes()
        rows = self._named_rows(part, times)
        assert rows.num_rows == count, f"{name}: planned {count} rows, read {rows.num_rows}"
        rows = rows.append_column(PART, pa.array([name] * count, pa.string()))
        rows = rows.append_column(PART_ROWS, pa.array([count] * count, pa.int64()))
        return rows.append_column(TIMES, pa.array([times.to_json()] * count, pa.string()))

    def _named_rows(self, part: pa.Table, times: StepTimes) -> pa.Table:
        """The rows of a part, with pseudonyms if requested; the crosswalk is written before anything uses them."""
        if self.identity is None:
            return self.rows(part, times=times)
        with self.identity.hidden_in_errors([part]):
            rows = self.rows(part, times=times)
        self.identity.record(rows)
        return self.identity.applied(rows)


def part_key(name: str, images: int, plan: str, row_group: int) -> pa.Table:
    """What passes through Ray in place of a part's rows: where they are."""
    return pa.table({PART: [name], PART_ROWS: [images], _PLAN: [plan], _ROW_GROUP: [row_group]})


def read_planned(plan: str, row_group: int) -> pa.Table:
    """The rows of a part, with the metadata of its manifest; see `inference.plan_store`."""
    table = pq.ParquetFile(pa.BufferReader(_content(plan))).read_row_group(row_group, use_threads=False)
    metadata = {key: value for key, value in table.schema.metadata.items() if key not in (ORIGIN_KEY, PARTS_KEY)}
    return table.replace_schema_metadata(metadata or None)


@lru_cache(maxsize=1)
def _content(plan: str) -> bytes:
    return storage.read_bytes(plan)


def is_read(part: pa.Table) -> bool:
    """Whether a table contains the rows of a part, or only says which they are."""
    return schema.ERROR in part.column_names
