"""Reading shards for training: seeded, exact over workers, without decoding and without Ray.

Every worker computes the same plan from `archive.json` and reads only what it needs. A split that fits in
`cache_bytes` is kept in memory and permuted as a whole, so that one or several workers see the same global
batches; a larger one is dealt to the workers by row groups and permuted inside a moving window. Both live in
memory that is filled again and again: touching fresh pages costs more than reading the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cxr import batches, schema, storage
from cxr.batches import Columns, Recycled, RowBuffer
from cxr.errors import UserError
from cxr.recipes.base import Batch
from cxr.shards import ARCHIVE_FILE, RowGroup, ShardInfo, row_groups


@dataclass
class ShardStream:
    """One worker's share of a split, epoch after epoch.

    Args:
        columns: columns of `cxr.schema` to read.
        batch_size: rows of this worker in a step.
        rank, world: this worker among those that train together.
        seed: of the order; every worker must be given the same.
        cache_bytes: of pixels in memory at once: the whole split, or a window of it.
        mask_label: which of the rows' masks batches hold, if they hold any.
    """

    info: ShardInfo
    split: str
    columns: Sequence[str]
    batch_size: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    cache_bytes: int = 1 << 28
    mask_label: str = schema.LUNGS

    def __post_init__(self) -> None:
        self._groups = row_groups(self.info, self.split)
        self._rows = sum(group.rows for group in self._groups)
        self._resident: RowBuffer | None = None
        self._arrays = Recycled()
        if self._rows < self.world:
            raise UserError(
                f"{self.info.uri} has {self._rows} images in its {self.split} split: too few for {self.world} "
                f"workers. Give a larger archive or fewer workers"
            )

    @property
    def rows(self) -> int:
        """Rows of the split, all workers together."""
        return self._rows

    @property
    def fits(self) -> bool:
        return self._rows * self.info.pixels.row_bytes <= self.cache_bytes

    @property
    def steps(self) -> int:
        """Training steps an epoch, the same on every worker; at least one."""
        if self.fits:
            return max(1, self._rows // (self.batch_size * self.world))
        # Row groups are dealt in a new order each epoch, so only the smallest possible share is sure.
        smallest = sorted(group.rows for group in self._groups)[: len(self._groups) // self.world]
        return max(1, sum(smallest) // self.batch_size)

    def train(self, epoch: int) -> Iterator[Batch]:
        """`steps` shuffled batches; the order depends only on seed, epoch and, for large splits, on world."""
        make = self._permuted(epoch) if self.fits else self._windowed(epoch)
        return batches.prefetched(batches.to_tensors(columns, self.info.pixels) for columns in make)

    def every(self) -> Iterator[Batch]:
        """Each row of this worker's share exactly once, in file order; shares differ by at most a row group."""
        return batches.prefetched(batches.to_tensors(columns, self.info.pixels) for columns in self._in_order())

    def _permuted(self, epoch: int) -> Iterator[Columns]:
        rows = self._load()
        order = np.random.default_rng((self.seed, epoch)).permutation(self._rows)
        step = self.batch_size * self.world
        for i in range(self.steps):
            yield rows.take(order[i * step : (i + 1) * step][self.rank :: self.world])

    def _windowed(self, epoch: int) -> Iterator[Columns]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self._groups))[self.rank :: self.world]
        groups = max(1, self.cache_bytes // (self.info.pixels.row_bytes * self.info.row_group_rows))
        window = RowBuffer(groups * self.info.row_group_rows + self.batch_size, self._arrays)
        made = 0
        for start in range(0, len(order), groups):
            for group in order[start : start + groups]:
                window.add(self._read(self._groups[group]))
            shuffled = rng.permutation(window.rows)
            whole = len(shuffled) // self.batch_size * self.batch_size
            for at in range(0, whole, self.batch_size):
                if made == self.steps:
                    return
                yield window.take(shuffled[at : at + self.batch_size])
                made += 1
            window.keep(shuffled[whole:])

    def _in_order(self) -> Iterator[Columns]:
        if self.fits:
            rows = self._load()
            own = np.arange(self.rank, self._rows, self.world)
            for at in range(0, len(own), self.batch_size):
                yield rows.take(own[at : at + self.batch_size])
            return
        for group in self._groups[self.rank :: self.world]:
            columns = self._read(group)
            for at in range(0, group.rows, self.batch_size):
                yield batches.take(columns, slice(at, at + self.batch_size))

    def _load(self) -> RowBuffer:
        """The whole split, read once."""
        if self._resident is None:
            rows = RowBuffer(self._rows, self._arrays)
            for group in self._groups:
                rows.add(self._read(group))
            self._resident = rows
        return self._resident

    def _read(self, group: RowGroup) -> Columns:
        rows = storage.read_parquet(group.uri, row_group=group.index, columns=self.columns)
        assert rows.num_rows == group.rows, f"{group.uri} was changed after {ARCHIVE_FILE} was written"
        return batches.to_columns(rows, self.columns, self.info.pixels, self.mask_label)
