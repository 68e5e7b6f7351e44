"""Reading shards for training: seeded, exact over workers, without decoding and without Ray.

Every worker computes the same plan from `archive.json` and, where images are chosen, from columns other than the
pixels; it reads only what it needs. What an epoch shows, and how many steps it has, is the same for any number of
workers. Rows that fit in `cache_bytes` are kept in memory and permuted as a whole, so that one or several workers
also see the same global batches; more rows are dealt to the workers by row groups and permuted inside a moving
window. Both live in memory that is filled again and again: touching fresh pages costs more than reading the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cxr import schema, storage
from cxr.data.batch import Batch, BufferPool, Columns, ShuffleBuffer, prefetched, stored, take, to_columns, to_tensors
from cxr.data.sampling import Fold, Sampling, rows_of
from cxr.data.shards import ARCHIVE_FILE, RowGroup, ShardInfo
from cxr.errors import UserError


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
        fold: what "train" and "val" stand for, instead of the archive's own.
        sampling: how many of the images that `train` shows have a finding, instead of each image once.

    Raises:
        UserError: fewer images than workers, fewer patients than folds, or nothing to sample.
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
    fold: Fold | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        self._rows = rows_of(self.info, self.split, self.fold)
        self._resident: ShuffleBuffer | None = None
        self._arrays = BufferPool()
        if self.rows < self.world:
            raise UserError(
                f"{self._named} are too few for {self.world} workers. Give a larger archive or fewer workers"
            )
        self._positive_N = self._positives(self.sampling) if self.sampling else None

    @property
    def _named(self) -> str:
        fold = f" of fold {self.fold.number} of {self.fold.of}" if self.fold else ""
        return f"{self.info.uri}: the {self.rows} images in its {self.split} split{fold}"

    def _positives(self, sampling: Sampling) -> np.ndarray:
        """(rows,) bool: which images show the finding that is sampled."""
        findings = self.info.findings
        wanted = findings if sampling.finding == schema.ANY_FINDING else (sampling.finding,)
        if not wanted or not set(wanted) <= set(findings):
            known = f"its findings are {', '.join(findings)}" if findings else "it knows no findings"
            raise UserError(
                f"{self.info.uri} does not say which images show {sampling.finding}: {known}. Give another archive, "
                f"or train on its images as they are"
            )
        positive_N = self._rows.showing([findings.index(finding) for finding in wanted])
        if not positive_N.any() or (positive_N.all() and min(sampling.shares) < 1):
            kind = "all" if positive_N.any() else "none"
            raise UserError(
                f"{self._named}: {kind} of them show {sampling.finding}, and both kinds are needed. Give an archive "
                f"with both, or train on its images as they are"
            )
        return positive_N

    @property
    def rows(self) -> int:
        """Rows of the split, all workers together."""
        return len(self._rows)

    @property
    def fits(self) -> bool:
        return self.rows * self.info.pixels.row_bytes <= self.cache_bytes

    @property
    def steps(self) -> int:
        """Training steps an epoch, the same on every worker; at least one."""
        return max(1, self._shown // self._step)

    @property
    def _step(self) -> int:
        """Images of all workers in a step."""
        return self.batch_size * self.world

    @property
    def _shown(self) -> int:
        """Images of an epoch, what is left over from whole steps included."""
        if self.sampling is None or self._positive_N is None:
            return self.rows
        return self.sampling.images(int(self._positive_N.sum()), self._step)

    def train(self, epoch: int) -> Iterator[Batch]:
        """`steps` shuffled batches; which rows they show depends on seed, epoch and the size of global batches."""
        rng = np.random.default_rng((self.seed, epoch))
        shown = self._drawn(epoch, rng)[: self.steps * self._step]
        make = self._permuted(shown) if self.fits else self._windowed(shown, rng)
        return prefetched(to_tensors(columns, self.info.pixels) for columns in make)

    def _drawn(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the rows that all workers together show, shuffled; a row may stand there several times."""
        if self.sampling is None or self._positive_N is None:
            return rng.permutation(self.rows)
        return self.sampling.draw(self._positive_N, self._shown, epoch, rng)

    def every(self) -> Iterator[Batch]:
        """Each row of this worker's share exactly once, in file order; shares differ by at most a row group."""
        return prefetched(to_tensors(columns, self.info.pixels) for columns in self._in_order())

    def _permuted(self, shown: np.ndarray) -> Iterator[Columns]:
        rows = self._load()
        for start in range(0, len(shown), self._step):
            yield rows.take(shown[start : start + self._step][self.rank :: self.world])

    def _windowed(self, shown: np.ndarray, rng: np.random.Generator) -> Iterator[Columns]:
        """This worker's stretch of what is shown, once sorted by row group: all stretches are equally long."""
        ends = [len(shown) * rank // self.world for rank in (self.rank, self.rank + 1)]
        own = self._rows.together(shown, rng)[slice(*ends)]
        held = max(1, self.cache_bytes // (self.info.pixels.row_bytes * self.info.row_group_rows))
        held *= self.info.row_group_rows
        window, fresh = ShuffleBuffer(held + self.batch_size, self._arrays), 0
        for columns, inside in self._pieces(own):
            if fresh + len(inside) > held:
                yield from self._shuffled(window, rng)
                fresh = 0
            window.add(columns, inside)
            fresh += len(inside)
        yield from self._shuffled(window, rng)
        if window.rows:  # fewer rows than a batch has, in the whole of the share
            yield window.take(np.arange(window.rows))

    def _pieces(self, rows: np.ndarray) -> Iterator[tuple[Columns, np.ndarray]]:
        """Row groups and where in them `rows` are, no more at once than a row group has rows."""
        most = self.info.row_group_rows
        for group, inside in self._rows.by_group(rows):
            columns = self._read(group)
            for start in range(0, len(inside), most):
                yield columns, inside[start : start + most]

    def _shuffled(self, window: ShuffleBuffer, rng: np.random.Generator) -> Iterator[Columns]:
        """The window's whole batches; what is left over stays in it."""
        order = rng.permutation(window.rows)
        whole = len(order) // self.batch_size * self.batch_size
        for start in range(0, whole, self.batch_size):
            yield window.take(order[start : start + self.batch_size])
        window.keep(order[whole:])

    def _in_order(self) -> Iterator[Columns]:
        if self.fits:
            rows = self._load()
            own = np.arange(self.rank, self.rows, self.world)
            for start in range(0, len(own), self.batch_size):
                yield rows.take(own[start : start + self.batch_size])
            return
        for group, inside in list(self._rows.by_group(np.arange(self.rows)))[self.rank :: self.world]:
            columns = self._read(group)
            for start in range(0, len(inside), self.batch_size):
                yield take(columns, inside[start : start + self.batch_size])

    def _load(self) -> ShuffleBuffer:
        """The whole split, read once."""
        if self._resident is None:
            rows = ShuffleBuffer(self.rows, self._arrays)
            for group, inside in self._rows.by_group(np.arange(self.rows)):
                rows.add(self._read(group), inside)
            self._resident = rows
        return self._resident

    def _read(self, group: RowGroup) -> Columns:
        rows = storage.read_parquet(group.uri, row_group=group.index, columns=stored(self.columns))
        assert rows.num_rows == group.rows, f"{group.uri} was changed after {ARCHIVE_FILE} was written"
        info = self.info
        return to_columns(rows, self.columns, info.pixels, self.mask_label, info.findings, max(1, info.most_boxes))
