"""Select rows of shards: a split or a fold by patient, and sampling with a given fraction of positive images.

Everything here depends only on the shards, the seed and the epoch, so all workers select the same rows. What it
needs of the index of the shards is kept in `ShardInfo.selections`, and can be stored for other processes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cxr import schema, storage
from cxr.data.shard_index import read_labels
from cxr.data.shards import RowGroup, ShardInfo, row_groups
from cxr.errors import UserError
from cxr.sources.splits import stratified


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
                f"use fractions such as 0.5"
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


def rows_of(info: ShardInfo, split: str, fold: Fold | None = None) -> Rows:
    """The rows of a split; with a fold, "val" is that fold of train and val combined, and "train" the other folds.

    Raises:
        UserError: there are fewer patients than folds.
    """
    splits = splits_of(split, fold)
    groups = [group for name in splits for group in row_groups(info, name)]
    if fold is None or split == "test":
        return Rows(groups, np.arange(sum(group.rows for group in groups)))
    in_fold = _folds(info, fold.of) == fold.number
    return Rows(groups, np.flatnonzero(in_fold if split == "val" else ~in_fold))


def splits_of(split: str, fold: Fold | None) -> tuple[str, ...]:
    """The archive's own splits that the rows of a split are from."""
    return (split,) if fold is None or split == "test" else ("train", "val")


def showing(info: ShardInfo, split: str, findings: Sequence[str], fold: Fold | None = None) -> np.ndarray:
    """bool, one for each of `rows_of(info, split, fold)`: whether any of these findings is positive."""
    splits = splits_of(split, fold)
    key = json.dumps(["showing", splits, list(findings)])
    if key not in info.selections:
        labels, _ = read_labels(info, splits, findings)
        info.selections[key] = (labels == schema.POSITIVE).any(1)
    return info.selections[key][rows_of(info, split, fold).numbers_N]


def _folds(info: ShardInfo, folds: int) -> np.ndarray:
    """The fold of each image of train and val."""
    key = json.dumps(["folds", folds])
    if key not in info.selections:
        labels, patients = read_labels(info, ("train", "val"), info.findings, patients=True)
        info.selections[key] = stratified(labels, patients, folds).astype(np.min_scalar_type(folds))
    return info.selections[key]


def sampled_findings(info: ShardInfo, sampling: Sampling) -> Sequence[str]:
    """The findings of which an image needs one to count as positive; the shards may lack them."""
    return info.findings if sampling.finding == schema.ANY_FINDING else (sampling.finding,)


def store_selections(info: ShardInfo, uri: str) -> None:
    """Store what folds and sampling have needed of the index so far: a byte per image, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **info.selections)  # pyright: ignore[reportArgumentType]
    storage.write_bytes(uri, buffer.getvalue())


def load_selections(info: ShardInfo, uri: str) -> None:
    """Add what `store_selections` stored, so that the index need not be read for it."""
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as stored:
        info.selections.update(stored)
