"""Training, validation and test parts of an archive, disjoint by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.errors import UserError

VAL_SHARE = 0.1  # of the patients that no official list holds for the test
VAL_AT_LEAST = 10  # patients, or VAL_SHARE of fewer than a hundred: chance alone may leave a small archive with one
TEST_SHARE = 0.1  # of the patients that no official list names


def split_by_patient(
    patient_ids: pa.Array | pa.ChunkedArray,
    in_test: np.ndarray | None = None,
    in_train_val: np.ndarray | None = None,
    seed: int = 0,
) -> pa.Array:
    """The split of each image: what the official lists say of its patient, else a hash of the patient's id.

    A patient with one image in the official test list is a test patient with all of them. Elsewhere the split
    hangs on the id and the seed alone, so that it stays when images come or go; only where an archive is so
    small that too little would be left to train on or to validate with do the nearest patients fill the gap.

    Args:
        patient_ids: string (N), without nulls.
        in_test: bool (N), whether the source's official test list names the image.
        in_train_val: bool (N), the same for its list of training and validation together.
        seed: another seed, another choice wherever no list decides.

    Returns:
        string (N), values of `schema.SPLITS`.
    """
    assert patient_ids.null_count == 0, "every image has a patient, if need be one of its own"
    encoded = patient_ids.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    patient_N = encoded.indices.to_numpy()
    draws = _draws(encoded.dictionary.to_pylist(), seed)
    test = _with_any(in_test, patient_N, len(draws))
    train_val = _with_any(in_train_val, patient_N, len(draws))

    ours = ~test
    wanted = min(VAL_AT_LEAST, max(1, round(VAL_SHARE * ours.sum())))
    enough, highest = np.sort(np.where(ours, draws, 1.0))[wanted - 1], draws.max(where=ours, initial=0.0)
    val = ours & (draws <= max(VAL_SHARE, enough)) & (draws < highest)
    more_test = ours & ~train_val & ~val & (draws >= 1 - TEST_SHARE)
    if (ours & ~val & ~more_test).any():
        test |= more_test
    number = np.select([test, val], [schema.SPLITS.index("test"), schema.SPLITS.index("val")], 0)
    return pa.array(schema.SPLITS).take(pa.array(number[patient_N]))


def stratified(labels_NK: np.ndarray, groups_N: np.ndarray, folds: int) -> np.ndarray:
    """(N,) each image's fold, from 0, so that each fold has its share of every finding and of the images.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): the rarest finding of those left is dealt out
    first, each group to the fold that lacks most of it. Groups (patients) stay whole, and come in the order of a hash
    of their ids, so that the folds hang on the images, their labels and the number of folds alone.

    Args:
        labels_NK: as `schema.LABELS`; what is not positive counts as negative.
        groups_N: ids, which become text.

    Raises:
        UserError: fewer groups than folds.
    """
    groups, group_N = np.unique(np.asarray(groups_N).astype(str), return_inverse=True)
    if len(groups) < folds:
        raise UserError(f"{len(groups)} patients to train and validate with are too few for {folds} folds")
    counts_GK = np.zeros((len(groups), labels_NK.shape[1] + 1))  # images by finding, and at last all of them
    np.add.at(counts_GK, group_N, np.column_stack([labels_NK == schema.POSITIVE, np.ones(len(group_N), bool)]))
    lacking_FK = np.tile(counts_GK.sum(0) / folds, (folds, 1))
    order = np.argsort([hashlib.blake2b(f"fold {group}".encode(), digest_size=8).hexdigest() for group in groups])
    fold_G = np.full(len(groups), -1)
    while (left := order[fold_G[order] < 0]).size:
        having_K = (counts_GK[left] > 0).sum(0)
        finding = int(np.where(having_K > 0, having_K, np.iinfo(np.int64).max).argmin())
        for group in left[counts_GK[left, finding] > 0].tolist():
            fold = int(np.lexsort((-lacking_FK[:, -1], -lacking_FK[:, finding]))[0])
            fold_G[group] = fold
            lacking_FK[fold] -= counts_GK[group]
    return fold_G[group_N]


def _draws(patients: Sequence[str], seed: int) -> np.ndarray:
    """A number in [0, 1) a patient, the same on every machine and in every process."""
    digests = (hashlib.blake2b(f"{seed}:{patient}".encode(), digest_size=4).digest() for patient in patients)
    return np.frombuffer(b"".join(digests), ">u4") / 2.0**32


def _with_any(images: np.ndarray | None, patient_N: np.ndarray, patients: int) -> np.ndarray:
    """bool (patients): who has an image among `images`, bool (N)."""
    found = np.zeros(patients, bool)
    if images is not None:
        found[patient_N[images]] = True
    return found
