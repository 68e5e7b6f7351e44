"""Training, validation and test splits, disjoint by patient."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError

VAL_SHARE = 0.1  # of the patients that are not in an official test list
VAL_AT_LEAST = 10  # patients; VAL_SHARE of archives with fewer than a hundred, where chance might leave only one
TEST_SHARE = 0.1  # of the patients that are in no official list
SPLIT_WORDS = {  # in the lists of users, in lower case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_CHUNK = 65_536  # ids that are Python objects at a time


def split_by_patient(
    patient_ids: pa.Array | pa.ChunkedArray,
    in_test: np.ndarray | None = None,
    in_train_val: np.ndarray | None = None,
    seed: int = 0,
    hashes: np.ndarray | None = None,
) -> pa.Array:
    """The split of each image: from the official lists by patient, else from a hash of the patient's id.

    All images of a patient with any image in the official test list are in the test split. Other splits depend only
    on the patient's id and the seed, so they do not change when images are added or removed. Only in archives so
    small that training or validation would have too few patients do the patients with the nearest hashes fill the
    gap.

    Args:
        patient_ids: string (N), without nulls.
        in_test: bool (N), whether the image is in the official test list.
        in_train_val: bool (N), whether the image is in the official list for training and validation.
        seed: seed of the hash, for patients that are in no list.
        hashes: float (N) in [0, 1), the hash of each image's patient, if not that of `patient_ids`.

    Returns:
        string (N), values of `schema.SPLITS`.
    """
    assert patient_ids.null_count == 0, "every image needs a patient, if necessary its own"
    encoded = patient_ids.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    patient_N = encoded.indices.to_numpy()
    if hashes is None:
        hashes = hash_values(encoded.dictionary, seed)
    else:
        of_images, hashes = hashes, np.empty(len(encoded.dictionary))
        hashes[patient_N] = of_images
    test = _with_any(in_test, patient_N, len(hashes))
    train_val = _with_any(in_train_val, patient_N, len(hashes))

    free = ~test
    min_val = min(VAL_AT_LEAST, max(1, round(VAL_SHARE * free.sum())))
    val_limit, highest = np.sort(np.where(free, hashes, 1.0))[min_val - 1], hashes.max(where=free, initial=0.0)
    val = free & (hashes <= max(VAL_SHARE, val_limit)) & (hashes < highest)
    more_test = free & ~train_val & ~val & (hashes >= 1 - TEST_SHARE)
    if (free & ~val & ~more_test).any():
        test |= more_test
    number = np.select([test, val], [schema.SPLITS.index("test"), schema.SPLITS.index("val")], 0)
    return pa.array(schema.SPLITS).take(pa.array(number[patient_N]))


def official_splits(patient_ids: pa.Array | pa.ChunkedArray, official: pa.Array) -> pa.Array:
    """The split of each image: the official one of its patient, else from a hash of the patient's id.

    A patient with images in several official splits is in the last of them (`schema.SPLITS`). If no image is in the
    official validation split, validation is a hash of the patients of the training split.

    Args:
        patient_ids: string (N), without nulls.
        official: string (N), values of `schema.SPLITS`; null for images that are in no list.
    """
    of_image = pc.fill_null(pc.index_in(official, value_set=pa.array(schema.SPLITS)), -1).to_numpy()
    hashed = split_by_patient(patient_ids, of_image == schema.SPLITS.index("test"), of_image >= 0)
    if not (of_image == schema.SPLITS.index("val")).any():
        return hashed
    encoded = patient_ids.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    patient_N = encoded.indices.to_numpy()
    of_patient = np.full(len(encoded.dictionary), -1)
    np.maximum.at(of_patient, patient_N, of_image)
    number = of_patient[patient_N]
    listed = pa.array(schema.SPLITS).take(pa.array(number, mask=number < 0))
    return pc.coalesce(listed, hashed)


def stratified(labels_NK: np.ndarray, groups_N: np.ndarray | pa.ChunkedArray, folds: int) -> np.ndarray:
    """(N,) each image's fold, from 0; folds are balanced in the number of images and of every finding.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): groups with the rarest remaining finding are
    assigned first, each to the fold that lacks most of that finding. Groups (patients) are never divided. They are
    ordered by a hash of their ids, so that folds depend only on the images, their labels and the number of folds.

    Args:
        labels_NK: as `schema.LABELS`; labels that are not positive count as negative.
        groups_N: group ids, numbers or text.

    Raises:
        UserError: there are fewer groups than folds.
    """
    ids = groups_N if isinstance(groups_N, pa.ChunkedArray) else pa.array(np.asarray(groups_N).astype(str))
    encoded: Any = pc.dictionary_encode(ids)  # pyright: ignore[reportAttributeAccessIssue]
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    position = pc.sort_indices(encoded.dictionary)
    groups = encoded.dictionary.take(position)
    group_N = np.argsort(position.to_numpy())[encoded.indices.to_numpy()]
    if len(groups) < folds:
        raise UserError(
            f"expected at least {folds} patients for training and validation in {folds} folds, got {len(groups)}: "
            f"use fewer folds"
        )
    shows_KN = (labels_N == schema.POSITIVE for labels_N in labels_NK.T)
    counts = [np.bincount(group_N[shows_N], minlength=len(groups)) for shows_N in shows_KN]
    # images by finding; the last column counts all images
    counts_GK = np.stack([*counts, np.bincount(group_N, minlength=len(groups))], 1).astype(np.int32)
    lacking_FK = np.tile(counts_GK.sum(0) / folds, (folds, 1))
    remaining = np.argsort(_digests("fold ", groups, 8).view(">u8"))
    fold_G = np.empty(len(groups), np.int64)
    while remaining.size:
        groups_K = np.count_nonzero(counts_GK[remaining], axis=0)
        finding = int(np.where(groups_K > 0, groups_K, np.iinfo(np.int64).max).argmin())
        has_finding = counts_GK[remaining, finding] > 0
        chosen, remaining = remaining[has_finding], remaining[~has_finding]
        fold_G[chosen] = _spread(lacking_FK[:, [finding, -1]], counts_GK[chosen][:, [finding, -1]])
        np.subtract.at(lacking_FK, fold_G[chosen], counts_GK[chosen])
    return fold_G[group_N]


def _spread(lacking_F2: np.ndarray, counts_G2: np.ndarray) -> list[int]:
    """The fold of each group: that which lacks most images with a finding, and of equal ones most images.

    Args:
        lacking_F2: images with the finding, and all images, that each fold lacks at first.
        counts_G2: those of each group.
    """
    with_finding, every = lacking_F2.T.tolist()
    folds, chosen = range(len(every)), list[int]()
    for of_finding, images in counts_G2.tolist():
        fold = max(folds, key=lambda number: (with_finding[number], every[number]))
        with_finding[fold] -= of_finding
        every[fold] -= images
        chosen.append(fold)
    return chosen


def hash_values(patients: pa.Array, seed: int = 0) -> np.ndarray:
    """A number in [0, 1) per patient (string), the same on every machine and in every process."""
    return _digests(f"{seed}:", patients, 4).view(">u4") / 2.0**32


def _digests(prefix: str, texts: pa.Array, size: int) -> np.ndarray:
    """uint8 (N * size,): a hash of each text after a prefix."""
    digests = bytearray()
    for start in range(0, len(texts), _CHUNK):
        for text in texts.slice(start, _CHUNK).to_pylist():
            digests += hashlib.blake2b(f"{prefix}{text}".encode(), digest_size=size).digest()
    return np.frombuffer(digests, np.uint8)


def _with_any(images: np.ndarray | None, patient_N: np.ndarray, patients: int) -> np.ndarray:
    """bool (patients): whether any of the patient's images is marked in `images`, bool (N)."""
    result = np.zeros(patients, bool)
    if images is not None:
        result[patient_N[images]] = True
    return result
