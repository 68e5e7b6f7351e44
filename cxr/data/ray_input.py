"""Training input by Ray Data: raw archives, decoded in every epoch (--stream), and shards (--shard-reader ray).

The order of rows is the same in every run with the same seed and number of workers, because Ray preserves the order
of blocks and each task reads fixed row groups. Only their order, which a seed decides, changes in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import Dataset, RandomSeedConfig
from ray.exceptions import RayError

from cxr import schema, storage
from cxr.data import ledger, shards
from cxr.data.decode import CropSettings, make_counted_rows, make_rows
from cxr.data.manifest_files import read_piece, write_pieces
from cxr.data.ray_data import configured, map_blocks
from cxr.data.shards import RowGroup, ShardInfo
from cxr.errors import UserError
from cxr.imaging.enhance import Enhancement
from cxr.runtime import cluster
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.labeling import one_reader
from cxr.sources.manifest import Manifest, boxes_frame_px
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, GateMode, Labeling, ReaderBoxes, ReadOptions
from cxr.sources.true_boxes import PART_SHARE, BoxCounts

_TASK_ROWS, _TASKS_AT_LEAST = 512, 16  # maximum rows of a task, unless row groups are larger; tasks of small archives
_BLOCK_BYTES = 16 << 20  # size of the blocks that tasks yield
_DECODED_ROWS = 64  # maximum number of images that a task decodes at a time
_DECODER_CPUS = 0.5  # CPUs per decoding task: while one of two tasks waits for files, the other uses the CPU
_LOOKED_AT = 32  # number of images whose boxes are checked before streaming
_LOOK_S = 120  # time limit of this check, seconds


@dataclass(frozen=True)
class RowStream:
    """The usable rows of a split, from which a Ray dataset is made whenever workers start.

    Args:
        tasks: the row groups that each task reads.
        read: yields the rows of a task's row groups.
        shuffled: whether each pass has another order of tasks.
        cpus: of a task.
    """

    tasks: tuple[tuple[RowGroup, ...], ...]
    read: Callable[[Sequence[RowGroup]], Iterator[pa.Table]]
    shuffled: bool
    cpus: float

    @property
    def rows(self) -> int:
        """The number of rows, including images that turn out to be unusable."""
        return sum(group.rows for task in self.tasks for group in task)

    def dataset(self, seed: int) -> Dataset:
        """A dataset whose passes have orders that depend on the seed and on the number of the pass."""
        numbers = [{"task": number} for number in range(len(self.tasks))]
        keys = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        if self.shuffled:
            keys = keys.randomize_block_order(seed=RandomSeedConfig(seed))
        rows = configured(map_blocks(keys, self._read, num_cpus=self.cpus))
        rows.context.target_max_block_size = _BLOCK_BYTES
        rows.context.execution_options.preserve_order = True
        return rows

    def _read(self, key: pa.Table) -> Iterator[pa.Table]:
        cv2.setNumThreads(0)  # every core has a task of its own
        for number in key["task"].to_pylist():
            yield from self.read(self.tasks[number])


Streams = dict[str, RowStream]


# ---- Shards


def shard_streams(info: ShardInfo, columns: Sequence[str]) -> Streams:
    """The train and val splits of shards.

    Args:
        columns: columns of `schema.row_schema`.
    """
    read = partial(_read_shards, columns=tuple(columns), findings=info.findings)
    return {
        split: _stream(shards.row_groups(info, split), read, shuffled=split == "train", cpus=1.0)
        for split in ("train", "val")
    }


def _read_shards(groups: Sequence[RowGroup], columns: Sequence[str], findings: Sequence[str]) -> Iterator[pa.Table]:
    reader = storage.RowGroupReader()
    for group in groups:
        yield shards.read_rows(group, columns, findings, reader)


def _stream(groups: Sequence[RowGroup], read: Callable, *, shuffled: bool, cpus: float) -> RowStream:
    """A stream whose tasks read `_TASK_ROWS` rows each, fewer in a small archive."""
    rows = sum(group.rows for group in groups)
    of_task = min(_TASK_ROWS, -(-rows // _TASKS_AT_LEAST))
    count = max(1, of_task // max(1, max((group.rows for group in groups), default=1)))
    tasks = tuple(tuple(groups[start : start + count]) for start in range(0, len(groups), count))
    return RowStream(tasks, read, shuffled, cpus)


# ---- Raw archives


def archive_streams(
    uri: str,
    out: str,
    pixels: PixelFormat,
    reading: ReadOptions = ALL_IMAGES,
    labeling: Labeling = SOURCE_LABELS,
    *,
    columns: Sequence[str] | None = None,
    crop: CropSettings | None = None,
    enhance: Enhancement | None = None,
    seed: int = 0,
) -> tuple[Streams, Manifest]:
    """The train and val splits of a raw archive, to train on without shards, and the archive's manifest.

    Args:
        out: folder in which the manifest is stored for the tasks that decode its images.
        pixels: format of the rows' pixels.
        reading: how the archive is read, and which of its images.
        labeling: labels and boxes other than the source's own, and how those of several readers are combined.
        columns: columns of `schema.row_schema`; None for all.
        crop: squares to cut out of the images, instead of whole images.
        enhance: changes to the images.
        seed: random seed that decides which images of train a task decodes.

    Raises:
        UserError: there is no archive, a split has no images, or boxes are outside their images.
    """
    manifest = open_manifest(uri, reading, labeling)
    if columns is None or schema.BOXES in columns:
        _check_boxes(manifest.table)
    train, val = (_of_split(manifest.table, split, uri) for split in ("train", "val"))
    train = ledger.rows_at(train, np.random.default_rng(seed).permutation(train.num_rows))
    decoder = Decoder(
        pixels,
        tuple(columns or schema.row_schema(pixels).names),
        crop,
        enhance,
        "exclude" if reading.gate == "exclude" else "off",  # training has no use for a warning
        labeling.reader_boxes,
    )
    streams = {}
    for split, rows in (("train", train), ("val", val)):
        step = min(_TASK_ROWS, -(-rows.num_rows // _TASKS_AT_LEAST))
        pieces = [rows.slice(start, step) for start in range(0, rows.num_rows, step)]
        groups = write_pieces(storage.join(out, split), pieces)
        streams[split] = _stream(groups, decoder, shuffled=split == "train", cpus=_DECODER_CPUS)
    return streams, manifest


@dataclass(frozen=True)
class Decoder:
    """Decodes the images of stored pieces of a manifest."""

    pixels: PixelFormat
    columns: tuple[str, ...]
    crop: CropSettings | None
    enhance: Enhancement | None
    check: GateMode
    reader_boxes: ReaderBoxes

    def __call__(self, groups: Sequence[RowGroup]) -> Iterator[pa.Table]:
        """The usable images, some at a time."""
        rows = pa.concat_tables(map(read_piece, groups))
        rows = one_reader(Manifest(rows, ()), self.reader_boxes).table
        crop = self.crop.loaded() if self.crop else None
        step = max(1, min(_DECODED_ROWS, _BLOCK_BYTES // self.pixels.row_bytes))
        for start in range(0, rows.num_rows, step):
            some = rows.slice(start, step)
            made = make_rows(some, self.pixels, crop=crop, enhance=self.enhance, check=self.check)
            yield made.filter(made[schema.ERROR].is_null()).select(list(self.columns))


def _of_split(manifest: pa.Table, split: str, uri: str) -> pa.Table:
    rows = manifest.filter(pc.field(schema.SPLIT) == split)
    if not rows.num_rows:
        raise UserError(f"{uri} has no image in its {split} split: use another archive")
    return rows


def _check_boxes(manifest: pa.Table) -> None:
    """Raise UserError if boxes are outside images of unknown size: a stream decodes its images too late for that."""
    boxed = pc.greater(pc.list_value_length(manifest[schema.BOXES]), 0).fill_null(False)
    rows = manifest.filter(pc.and_(boxed, pc.is_null(manifest[schema.BOXES_FRAME])))
    if not rows.num_rows or boxes_frame_px(manifest.schema):
        return
    chosen = np.linspace(0, rows.num_rows - 1, min(_LOOKED_AT, rows.num_rows)).astype(int)
    where = cluster.data_machines()
    task = ray.remote(max_retries=0, num_cpus=_DECODER_CPUS, label_selector=where)(_box_counts)
    reply = task.remote(ledger.rows_at(rows, chosen))
    try:
        counts = ray.get(reply, timeout=_LOOK_S)
    except RayError:  # a file that crashes its decoder is reported by the stream itself
        ray.cancel(reply, force=True)
        return
    counts.check(PART_SHARE)


def _box_counts(manifest: pa.Table) -> BoxCounts:
    cv2.setNumThreads(0)  # every core has a task of its own
    return make_counted_rows(manifest, PixelFormat(16))[1]
