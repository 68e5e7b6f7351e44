"""Load shards for training: seeded, exact over workers, without decoding and without Ray.

Every worker computes the same plan from `archive.json` and, for sampling and folds, from what `data.sampling` knows
of the index; it reads only the pixels that it needs. The images and the number of steps of an epoch do not depend
on the number of workers. If the split fits in `cache_bytes`, it is kept in memory and permuted as a whole, so that
the global batches do not depend on the number of workers either. Otherwise rows are distributed by row group and
shuffled in a moving window. Row groups are read ahead by several threads and arrive in order. Memory is reused,
because touching fresh pages costs more than reading the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cxr import schema, storage
from cxr.data.batch import (
    Batch,
    BufferPool,
    Columns,
    ShuffleBuffer,
    stored,
    take,
    to_columns,
    to_tensors,
)
from cxr.data.prefetch import prefetched, read_ahead
from cxr.data.sampling import Fold, Sampling, rows_of, sampled_findings, showing
from cxr.data.shards import ARCHIVE_FILE, RowGroup, ShardInfo, read_rows
from cxr.errors import UserError
from cxr.wording import counted

_AHEAD, _AHEAD_LOCAL = 16, 4  # row groups that are read ahead, on a remote store and on a local disk
_AHEAD_BYTES = 256 << 20  # of their pixels


@dataclass
class ShardStream:
    """A worker's part of a split, for any number of epochs.

    Args:
        columns: columns of `cxr.schema` to read.
        batch_size: rows per step on this worker.
        rank, world: number of this worker, and number of workers.
        seed: seed of the order; it must be the same on all workers.
        cache_bytes: maximum size of pixels in memory: the whole split, or a window of it.
        mask_label: label of the mask in batches, if they have masks.
        fold: cross-validation fold that replaces the archive's own "train" and "val".
        sampling: fraction of positive images in `train`; by default each image is shown once.

    Raises:
        UserError: there are fewer images than workers, fewer patients than folds, or no positives or negatives to
            sample.
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
        self._reader = storage.RowGroupReader()
        if self.rows < self.world:
            raise UserError(
                f"expected at least {counted(self.world, 'image')} for {counted(self.world, 'worker')}, got "
                f"{self._described}: use a larger archive or fewer workers"
            )
        self._positive_N = self._positives(self.sampling) if self.sampling else None

    @property
    def _described(self) -> str:
        fold = f" of fold {self.fold.number} of {self.fold.of}" if self.fold else ""
        return f"{counted(self.rows, 'image')} in the {self.split} split{fold} of {self.info.uri}"

    def _positives(self, sampling: Sampling) -> np.ndarray:
        """(rows,) bool: whether each image shows the sampled finding."""
        findings, sampled = self.info.findings, sampled_findings(self.info, sampling)
        if not sampled or not set(sampled) <= set(findings):
            known = f"the findings {', '.join(findings)}" if findings else "no findings"
            raise UserError(
                f"expected labels of {sampling.finding} in {self.info.uri}, got {known}: use another archive, or "
                f"train without sampling"
            )
        positive_N = showing(self.info, self.split, sampled, self.fold)
        if not positive_N.any() or (positive_N.all() and min(sampling.shares) < 1):
            kind = "all" if positive_N.any() else "none"
            raise UserError(
                f"expected images with and without {sampling.finding}, got {self._described}, of which {kind} show "
                f"it: use an archive with both, or train without sampling"
            )
        return positive_N

    @property
    def rows(self) -> int:
        """Rows of the split, over all workers."""
        return len(self._rows)

    @property
    def fits(self) -> bool:
        return self.rows * self.info.pixels.row_bytes <= self.cache_bytes

    @property
    def steps(self) -> int:
        """Training steps per epoch, the same on every worker; at least one."""
        return max(1, self._shown // self._step)

    @property
    def _step(self) -> int:
        """Images per step, over all workers."""
        return self.batch_size * self.world

    @property
    def _shown(self) -> int:
        """Images per epoch, including an incomplete last step."""
        if self.sampling is None or self._positive_N is None:
            return self.rows
        return self.sampling.images(int(self._positive_N.sum()), self._step)

    def train(self, epoch: int, skipped: int = 0) -> Iterator[Batch]:
        """`steps` shuffled batches; their rows depend on the seed, the epoch and the global batch size.

        Args:
            skipped: number of batches to leave out at the beginning. Row groups that only they need are not read.
        """
        rng = np.random.default_rng((self.seed, epoch))
        count = min(self._shown, self.steps * self._step) // self.world * self.world  # equal parts for all workers
        shown = self._sample_rows(epoch, rng)[:count]
        make = self._permuted(shown, skipped) if self.fits else self._windowed(shown, rng, skipped)
        return prefetched(to_tensors(columns, self.info.pixels) for columns in make)

    def _sample_rows(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Row numbers of an epoch over all workers, shuffled; a row may occur several times."""
        if self.sampling is None or self._positive_N is None:
            return rng.permutation(self.rows)
        return self.sampling.draw(self._positive_N, self._shown, epoch, rng)

    def every(self) -> Iterator[Batch]:
        """Each row of this worker's part exactly once, in file order; parts differ by at most one row group."""
        return prefetched(to_tensors(columns, self.info.pixels) for columns in self._in_order())

    def first_ids(self, count: int) -> list[str]:
        """Ids of the first images of the split in file order, which is the order of `every` on a single worker."""
        ids: list[str] = []
        for group, inside in self._rows.by_group(np.arange(min(count, self.rows))):
            ids += read_rows(group, [schema.IMAGE_ID], ())[schema.IMAGE_ID].take(inside).to_pylist()
        return ids

    def _permuted(self, shown: np.ndarray, skipped: int) -> Iterator[Columns]:
        rows = self._load()
        for start in range(skipped * self._step, len(shown), self._step):
            yield rows.take(shown[start : start + self._step][self.rank :: self.world])

    def _windowed(self, shown: np.ndarray, rng: np.random.Generator, skipped: int) -> Iterator[Columns]:
        """This worker's part of the epoch, sorted by row group; all parts have the same length."""
        part = [len(shown) * rank // self.world for rank in (self.rank, self.rank + 1)]
        own = self._rows.together(shown, rng)[slice(*part)]
        window_rows = max(1, self.cache_bytes // (self.info.pixels.row_bytes * self.info.row_group_rows))
        window_rows *= self.info.row_group_rows
        ends = self._window_ends(own, window_rows)
        held, read, order = self._after(skipped, ends, rng)
        window = ShuffleBuffer(window_rows + self.batch_size, self._arrays)
        pieces = self._pieces([*self._rows.by_group(own[held]), *self._rows.by_group(own[read:])])
        self._fill(window, pieces, len(held))
        yield from self._batches(window, order)
        for end in [end for end in ends if end > read]:
            self._fill(window, pieces, end - read)
            read = end
            yield from self._batches(window, rng.permutation(window.rows))
        if window.rows:  # the whole part is smaller than a batch
            yield window.take(np.arange(window.rows))

    def _window_ends(self, own: np.ndarray, window_rows: int) -> list[int]:
        """How many rows of `own` have been read when the window is full, for each time that it is."""
        ends, read, added = list[int](), 0, 0
        for _, inside in self._rows.by_group(own):
            for count in (len(piece) for piece in self._cut(inside)):
                if added + count > window_rows:
                    ends.append(read)
                    added = 0
                read, added = read + count, added + count
        return [*ends, read]

    def _after(
        self, skipped: int, ends: Sequence[int], rng: np.random.Generator
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """The state of the window after the first `skipped` batches, without reading a row.

        Returns:
            The rows in it that have not been shown, increasing, as positions in this worker's part; how many rows
            have been read; and the order in which those in the window will be shown.
        """
        held, read = np.zeros(0, np.int64), 0
        for end in ends:
            rows = np.concatenate([held, np.arange(read, end)])
            order, read = rows[rng.permutation(len(rows))], end
            batches = len(order) // self.batch_size
            if batches > skipped or not skipped:
                rest = order[skipped * self.batch_size :]
                return np.sort(rest), read, np.argsort(np.argsort(rest))
            skipped -= batches
            held = order[batches * self.batch_size :]
        return held[:0], read, held[:0]  # all batches were skipped

    def _cut(self, inside: np.ndarray) -> Iterator[np.ndarray]:
        """Positions in a row group, at most as many at a time as it has rows: when sampling, rows are repeated."""
        most = self.info.row_group_rows
        return (inside[start : start + most] for start in range(0, len(inside), most))

    def _pieces(self, runs: Sequence[tuple[RowGroup, np.ndarray]]) -> Iterator[tuple[Columns, np.ndarray]]:
        """The columns of row groups, and the positions in them."""
        return ((columns, piece) for columns, inside in self._groups(runs) for piece in self._cut(inside))

    @staticmethod
    def _fill(window: ShuffleBuffer, pieces: Iterator[tuple[Columns, np.ndarray]], rows: int) -> None:
        """Add the next `rows` rows of the pieces to the window."""
        while rows > 0:
            columns, inside = next(pieces)
            window.add(columns, inside)
            rows -= len(inside)

    def _batches(self, window: ShuffleBuffer, order: np.ndarray) -> Iterator[Columns]:
        """The complete batches of the window in this order of its rows; the remainder stays in it."""
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
        for columns, inside in self._groups([*self._rows.by_group(np.arange(self.rows))][self.rank :: self.world]):
            for start in range(0, len(inside), self.batch_size):
                yield take(columns, inside[start : start + self.batch_size])

    def _load(self) -> ShuffleBuffer:
        """Read the whole split, once."""
        if self._resident is None:
            rows = ShuffleBuffer(self.rows, self._arrays)
            for columns, inside in self._groups([*self._rows.by_group(np.arange(self.rows))]):
                rows.add(columns, inside)
            self._resident = rows
        return self._resident

    def _groups(self, groups: Sequence[tuple[RowGroup, np.ndarray]]) -> Iterator[tuple[Columns, np.ndarray]]:
        """The columns of these row groups in place of them, read ahead."""
        group_bytes = self.info.row_group_rows * self.info.pixels.row_bytes
        most = _AHEAD_LOCAL if storage.is_local(self.info.uri) else _AHEAD
        ahead = max(2, min(most, _AHEAD_BYTES // group_bytes))
        columns = read_ahead(self._read, (group for group, _ in groups), ahead)
        return zip(columns, (inside for _, inside in groups), strict=True)

    def _read(self, group: RowGroup) -> Columns:
        info = self.info
        rows = read_rows(group, stored(self.columns), info.findings, self._reader)
        assert rows.num_rows == group.rows, f"{group.uri} was modified after {ARCHIVE_FILE} was written"
        return to_columns(rows, self.columns, info.pixels, self.mask_label, info.findings, max(1, info.most_boxes))
