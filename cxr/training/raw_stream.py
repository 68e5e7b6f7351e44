"""The source of a worker's batches: shards read directly, or shards or a raw archive streamed by Ray Data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from ray.data import DataIterator

from cxr import schema
from cxr.data import shards
from cxr.data.batch import Batch, to_columns, to_tensors
from cxr.data.sampling import load_selections
from cxr.data.shard_loader import ShardStream
from cxr.families.base import Communicator, Recipe
from cxr.families.compatibility import fold_of, sampling_of
from cxr.runtime import cluster
from cxr.runtime.progress import with_stall_notes
from cxr.schema import PixelFormat
from cxr.training.session import Session


class Stream(Protocol):
    """One worker's share of a split."""

    @property
    def steps(self) -> int: ...
    def train(self, epoch: int, skipped: int = 0) -> Iterator[Batch]: ...
    def every(self) -> Iterator[Batch]: ...


@dataclass
class RayStream:
    """One worker's share of a Ray Data stream of schema rows, which are read again in each pass.

    Args:
        rows: number of rows that the split lists. Rejected images reduce it, so `steps` is an upper bound.
        seed: seed of the order, to which the epoch is added.
        shuffle_rows: rows among which each training batch is drawn, besides the order of the blocks.
    """

    iterator: DataIterator
    columns: tuple[str, ...]
    pixels: PixelFormat
    batch_size: int
    rows: int
    world: int
    mask_label: str = schema.LUNGS
    findings: tuple[str, ...] = ()
    most_boxes: int = schema.MOST_BOXES
    seed: int = 0
    shuffle_rows: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.rows // (self.batch_size * self.world))

    def train(self, epoch: int, skipped: int = 0) -> Iterator[Batch]:
        """Complete batches only. Ray Data gives each worker an equal share; the order of blocks changes in each
        pass."""
        assert not skipped, "there are no checkpoints within an epoch"
        return self._batches(
            drop_last=self.rows >= self.batch_size * self.world,
            local_shuffle_buffer_size=max(self.shuffle_rows, self.batch_size),
            local_shuffle_seed=order_seed(self.seed, epoch),
        )

    def every(self) -> Iterator[Batch]:
        return self._batches(drop_last=False)

    def _batches(self, **options: Any) -> Iterator[Batch]:
        tables = self.iterator.iter_batches(
            batch_size=self.batch_size, batch_format="pyarrow", prefetch_batches=2, **options
        )
        for rows in with_stall_notes(tables, lambda: f"images to be read, while {cluster.free()}"):
            assert isinstance(rows, pa.Table)
            columns = to_columns(rows, self.columns, self.pixels, self.mask_label, self.findings, self.most_boxes)
            yield to_tensors(columns, self.pixels)


def order_seed(seed: int, epoch: int) -> int:
    """The seed of a random order that begins with an epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def share(recipe: Recipe, workers: Communicator) -> int:
    """Number of images per step on a worker."""
    return max(1, round(recipe.batch_size / workers.size))


def open_streams(
    data: dict[str, Any], recipe: Recipe, workers: Communicator, session: Session
) -> tuple[Stream, Stream]:
    """This worker's shares of the train and val splits. `data` is the description of the data that `fit` made from
    the archive's URI; with "streamed", Ray Data gives the rows."""
    own, streamed = share(recipe, workers), data.get("streamed")
    if streamed is None:
        info = shards.read_info(data["shards"])
        if data.get("selections"):
            load_selections(info, data["selections"])
        train, val = (
            ShardStream(
                info,
                split,
                recipe.columns,
                batch_size=own,
                rank=workers.rank,
                world=workers.size,
                seed=recipe.seed,
                cache_bytes=data["cache_bytes"],
                mask_label=recipe.mask_label,
                fold=fold_of(recipe),
                sampling=sampling_of(recipe) if split == "train" else None,
            )
            for split in ("train", "val")
        )
        return train, val
    pixels = PixelFormat(**streamed["pixels"])
    shares = {split: session.stream(split) for split in ("train", "val")}
    train, val = (
        RayStream(
            share,
            recipe.columns,
            pixels,
            own,
            streamed["rows"][split],
            workers.size,
            recipe.mask_label,
            tuple(streamed["findings"]),
            max(1, streamed["most_boxes"]),
            recipe.seed,
            streamed["shuffle_rows"],
        )
        for split, share in shares.items()
        if share is not None
    )
    return train, val
