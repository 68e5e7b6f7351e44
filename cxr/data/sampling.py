"""Select rows of shards: a split or a fold by patient, and sampling with a given fraction of positive images.

Everything here depends only on the shards, the seed and the epoch, so all workers select the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.data.shards import RowGroup, ShardFile, ShardInfo, read_rows, row_groups
from cxr.errors import UserError
from cxr.sources.splits import stratified

_THREADS = 16


@dataclass(frozen=True)
class Fold:
    """Fold `number` (from 0) out of `of`: it is used for validation, the others for training."""

    number: int
    of: int


@dataclass(frozen=True)
class Sampling:
    """Fraction of positive images in each epoch.

    Every epoch has the same length: all positives plus as many negatives as the mean positive fraction implies,
    rounded to whole steps. Within an epoch, the numbers of times that two positives (or two negatives) are shown
    differ by at most one.

    Args:
        finding: a finding of the archive, or `schema.ANY_FINDING`.
        shares: fraction of positive images per epoch, in [0, 1].
    """

    finding: str
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in self.shares) or not any(self.shares):
            raise UserError(
                f"expected fractions of images with {self.finding} from 0 to 1, not all 0, got {self.shares}: "
                f"correct them"
            )

    def images(self, positives: int, step: int) -> int:
        """Number of images per epoch, a multiple of `step`, the images of all workers in a step."""
        return max(1, round(positives * len(self.shares) / sum(self.shares) / step)) * step

    def draw(self, positive_N: np.ndarray, images: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Row numbers of an epoch, shuffled; `round(share * images)` of them are positive."""
        positives = round(self.shares[epoch] * images)
        shown = (
            _in_cycles(np.flatnonzero(positive_N), positives, rng),
            _in_cycles(np.flatnonzero(~positive_N), images - positives, rng),
        )
        return rng.permutation(np.concatenate(shown))


def _in_cycles(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the rows: each as often as possible, then a random remainder."""
    if not count:
        return rows[:0]
    return np.concatenate([rng.permutation(rows) for _ in range(-(-count // len(rows)))])[:count]


class Rows:
    """A selection of rows from row groups, numbered from 0 in file order.

    Args:
        groups: all row groups of some files.
        numbers: row numbers over all groups, increasing.
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
        """Divide `rows` into runs within a row group; yields the group and the positions of the rows in it."""
        if len(rows):
            ends = np.flatnonzero(np.diff(self.group_N[rows])) + 1
            for run in np.split(rows, ends.tolist()):
                yield self.groups[self.group_N[run[0]]], self.inside_N[run]

    def together(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sort `rows` by row group, with the groups in random order."""
        position = rng.permutation(len(self.groups))
        return rows[np.argsort(position[self.group_N[rows]], kind="stable")]

    def showing(self, findings: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether any of these findings is positive; reads only the labels."""
        return (_labels(self.groups, findings) == schema.POSITIVE).any(1)[self.numbers_N]


def rows_of(info: ShardInfo, split: str, fold: Fold | None = None) -> Rows:
    """The rows of a split; with a fold, "val" is that fold of train and val combined, and "train" the other folds.

    Raises:
        UserError: there are fewer patients than folds.
    """
    if fold is None or split == "test":
        groups = row_groups(info, split)
        return Rows(groups, np.arange(sum(group.rows for group in groups)))
    groups = [*row_groups(info, "train"), *row_groups(info, "val")]
    labels = _labels(groups, info.findings)
    in_fold = stratified(labels, _patients(groups), fold.of) == fold.number
    return Rows(groups, np.flatnonzero(in_fold if split == "val" else ~in_fold))


def _labels(groups: Sequence[RowGroup], findings: Sequence[str]) -> np.ndarray:
    """(N, findings) int8 labels."""
    lists = _columns(groups, [schema.LABELS], findings)[schema.LABELS]
    labels = np.full((len(lists), len(findings)), schema.UNKNOWN, np.int8)
    labels[lists.is_valid().to_numpy()] = pc.list_flatten(lists).to_numpy().reshape(-1, len(findings))
    return labels


def _patients(groups: Sequence[RowGroup]) -> np.ndarray:
    """(N,) patient ids; an image of an unknown patient counts as its own patient."""
    return schema.patients_of(_columns(groups, [schema.PATIENT_ID, schema.IMAGE_ID])).to_numpy()


def _columns(groups: Sequence[RowGroup], names: Sequence[str], findings: Sequence[str] = ()) -> pa.Table:
    """Read these columns of the files of all `groups`, labels in the order of `findings`."""
    rows = Counter[str]()
    for group in groups:
        rows[group.uri] += group.rows
    own = {group.uri: group.findings for group in groups}
    files = [ShardFile(uri, count, own[uri]) for uri, count in rows.items()]
    with ThreadPoolExecutor(_THREADS) as pool:
        table = pa.concat_tables(pool.map(partial(read_rows, columns=names, findings=findings), files))
    assert table.num_rows == sum(group.rows for group in groups), "the shards were modified after ingest"
    return table
