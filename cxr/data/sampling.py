"""Which rows of shards a stream shows: a split or a fold by patient, each image once or a share with a finding.

All that is decided here follows from the shards, the seed and the epoch, so that every worker decides alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data.shards import RowGroup, ShardInfo, row_groups
from cxr.errors import UserError
from cxr.sources.splits import stratified

_THREADS = 16


@dataclass(frozen=True)
class Fold:
    """One of `of` folds, by number from 0: it validates, the others train."""

    number: int
    of: int


@dataclass(frozen=True)
class Sampling:
    """How many images show a finding, epoch by epoch.

    Every epoch shows equally many images: all that show the finding, with as many others as the mean of the shares
    asks for, to the nearest whole number of steps. In an epoch each image of a kind is shown equally often, or once
    more than another.

    Args:
        finding: a finding of the archive, or `schema.ANY_FINDING`.
        shares: one an epoch, in [0, 1].
    """

    finding: str
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in self.shares) or not any(self.shares):
            raise UserError(f"shares of {self.finding} by epoch {self.shares}: wanted from 0 to 1, and not 0 in all")

    def images(self, positives: int, step: int) -> int:
        """Images of an epoch, a multiple of `step`: the images of all workers in a step."""
        return max(1, round(positives * len(self.shares) / sum(self.shares) / step)) * step

    def draw(self, positive_N: np.ndarray, images: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the rows that the epoch shows, shuffled; `round(share * images)` of them are positive."""
        positives = round(self.shares[epoch] * images)
        shown = (
            _in_cycles(np.flatnonzero(positive_N), positives, rng),
            _in_cycles(np.flatnonzero(~positive_N), images - positives, rng),
        )
        return rng.permutation(np.concatenate(shown))


def _in_cycles(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the rows: all of them as often as that goes, then some."""
    if not count:
        return rows[:0]
    return np.concatenate([rng.permutation(rows) for _ in range(-(-count // len(rows)))])[:count]


class Rows:
    """Some of the rows of row groups, numbered from 0 in file order.

    Args:
        groups: all row groups of some files.
        numbers: of the rows, counted through all groups; rising.
    """

    def __init__(self, groups: Sequence[RowGroup], numbers: np.ndarray) -> None:
        starts = np.cumsum([0, *(group.rows for group in groups)])
        self.groups = tuple(groups)
        self.numbers_N = numbers
        self.group_N = np.searchsorted(starts, numbers, side="right") - 1
        self.inside_N = numbers - starts[self.group_N]

    def __len__(self) -> int:
        return len(self.numbers_N)

    def by_group(self, rows: np.ndarray) -> Iterator[tuple[RowGroup, np.ndarray]]:
        """Each stretch of `rows` that lies in one row group: the group, and where in it those rows are."""
        if len(rows):
            ends = np.flatnonzero(np.diff(self.group_N[rows])) + 1
            for stretch in np.split(rows, ends.tolist()):
                yield self.groups[self.group_N[stretch[0]]], self.inside_N[stretch]

    def together(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`rows` sorted by row group, the groups in an order of their own."""
        place = rng.permutation(len(self.groups))
        return rows[np.argsort(place[self.group_N[rows]], kind="stable")]

    def showing(self, indices: Sequence[int]) -> np.ndarray:
        """(N,) bool: which rows show a finding of these indices; of the files only the labels are read."""
        labels = _columns(self.groups, [schema.LABELS])[schema.LABELS]
        shown = [pc.equal(pc.list_element(labels, i), schema.POSITIVE).fill_null(False).to_numpy() for i in indices]
        return np.logical_or.reduce(shown)[self.numbers_N]


def rows_of(info: ShardInfo, split: str, fold: Fold | None = None) -> Rows:
    """The rows of a split; with a fold, "val" is that fold of train and val together, "train" the others.

    Raises:
        UserError: fewer patients than folds.
    """
    if fold is None or split == "test":
        groups = row_groups(info, split)
        return Rows(groups, np.arange(sum(group.rows for group in groups)))
    groups = [*row_groups(info, "train"), *row_groups(info, "val")]
    labels = _labels(groups, len(info.findings))
    in_fold = stratified(labels, _patients(groups), fold.of) == fold.number
    return Rows(groups, np.flatnonzero(in_fold if split == "val" else ~in_fold))


def _labels(groups: Sequence[RowGroup], findings: int) -> np.ndarray:
    """(N, findings) int8."""
    unknown = [schema.UNKNOWN] * findings
    known = _columns(groups, [schema.LABELS])[schema.LABELS].to_pylist()
    return np.array([labels or unknown for labels in known], np.int8).reshape(len(known), findings)


def _patients(groups: Sequence[RowGroup]) -> np.ndarray:
    """(N,) ids; an image whose patient is not known is a patient of its own."""
    return schema.patients_of(_columns(groups, [schema.PATIENT_ID, schema.IMAGE_ID])).to_numpy()


def _columns(groups: Sequence[RowGroup], names: Sequence[str]) -> pa.Table:
    """These columns of the files of all `groups`, without their pixels."""
    uris = dict.fromkeys(group.uri for group in groups)
    with ThreadPoolExecutor(_THREADS) as pool:
        table = pa.concat_tables(pool.map(partial(storage.read_parquet, columns=names), uris))
    assert table.num_rows == sum(group.rows for group in groups), "shards were changed after they were finished"
    return table
