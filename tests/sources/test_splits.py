"""Splits are by patient, follow official lists, are reproducible, and leave images for training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr import schema
from cxr.errors import UserError
from cxr.sources import annotations, rater_agreement
from cxr.sources.splits import official_splits, split_by_patient, stratified

PATIENTS = st.lists(st.sampled_from([str(n) for n in range(12)]), min_size=1, max_size=40)


def _split(patients: list[str], **options) -> list[str]:
    return split_by_patient(pa.array(patients), **options).to_pylist()


@settings(deadline=None)
@given(PATIENTS, st.data())
def test_no_patient_is_in_two_splits(patients: list[str], data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=len(patients), max_size=len(patients)).map(np.array)
    splits = _split(
        patients, in_test=data.draw(flags), in_train_val=data.draw(flags), seed=data.draw(st.integers(0, 9))
    )
    assert len(set(zip(patients, splits, strict=True))) == len(set(patients))


def test_official_lists_take_precedence() -> None:
    patients = [str(n) for n in range(3000)]
    number = np.arange(3000)
    splits = np.array(_split(patients, in_test=number < 1000, in_train_val=number >= 1000))
    assert (splits[:1000] == "test").all()
    assert set(splits[1000:]) == {"train", "val"}
    assert np.mean(splits[1000:] == "val") == pytest.approx(0.1, abs=0.02)


def test_official_splits_of_all_three_kinds_and_patients_in_none() -> None:
    patients = ["a", "a", "b", "c", "d", "d", *map(str, range(3000))]
    official = ["train", None, "val", "test", "train", "test", *[None] * 3000]
    splits = official_splits(pa.array(patients), pa.array(official, pa.string())).to_pylist()
    assert splits[:6] == ["train", "train", "val", "test", "test", "test"]
    assert splits[6:] == _split([*map(str, range(3000))])


def test_without_an_official_validation_split_it_is_a_part_of_training() -> None:
    patients = [str(n) for n in range(3000)]
    official = np.where(np.arange(3000) < 1000, "test", "train")
    splits = np.array(official_splits(pa.array(patients), pa.array(official)).to_pylist())
    assert (splits[:1000] == "test").all()
    assert np.mean(splits[1000:] == "val") == pytest.approx(0.1, abs=0.02)


def test_one_image_in_the_test_list_makes_a_test_patient() -> None:
    in_test = np.array([False, True, False, False])
    assert _split(["a", "a", "b", "c"], in_test=in_test, in_train_val=~in_test)[:2] == ["test", "test"]


def test_fractions_without_lists() -> None:
    splits = np.array(_split([str(n) for n in range(5000)]))
    assert np.mean(splits == "val") == pytest.approx(0.1, abs=0.015)
    assert np.mean(splits == "test") == pytest.approx(0.1, abs=0.015)


def test_splits_do_not_change_when_patients_are_added() -> None:
    few, many = [str(n) for n in range(400)], [str(n) for n in range(4000)]
    assert _split(few) == _split(many)[:400]


def test_seeds_choose_differently() -> None:
    patients = [str(n) for n in range(400)]
    assert _split(patients, seed=1) == _split(patients, seed=1) != _split(patients, seed=2)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_archives_have_training_and_validation_images(count: int, seed: int) -> None:
    assert {"train", "val"} <= set(_split([str(n) for n in range(count)], seed=seed))


def test_a_single_patient_is_used_for_training() -> None:
    assert {_split(["a", "a"], seed=seed)[0] for seed in range(30)} == {"train"}


def test_splits_are_the_same_in_another_process() -> None:
    call = "split_by_patient(pa.array(list('abcdefgh')))"
    code = f"import pyarrow as pa; from cxr.sources.splits import split_by_patient; print(*{call})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == _split(list("abcdefgh"))


# ---- Folds with their share of every finding


def _labels(rng: np.random.Generator, images: int, rates: tuple[float, ...]) -> np.ndarray:
    return (rng.random((images, len(rates))) < rates).astype(np.int8)


def test_folds_are_balanced_in_rare_findings_and_images() -> None:
    labels = _labels(np.random.default_rng(0), 2000, (0.3, 0.05, 0.01))
    fold = stratified(labels, np.arange(2000), 5)
    counts = np.array([labels[fold == number].sum(0) for number in range(5)])
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(np.bincount(fold, minlength=5)) <= 2


@settings(deadline=None)
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_groups_are_not_divided_and_the_order_does_not_matter(folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, groups = _labels(rng, 40, (0.4, 0.1)), np.array([f"p{n}" for n in [*range(4), *rng.integers(0, 12, 36)]])
    fold = stratified(labels, groups, folds)
    assert len({*zip(groups, fold, strict=True)}) == len(set(groups))
    assert set(fold) <= {*range(folds)}
    order = rng.permutation(40)
    np.testing.assert_array_equal(stratified(labels[order], groups[order], folds), fold[order])


def test_folds_without_labels_have_equal_size() -> None:
    nothing = np.full((33, 2), schema.UNKNOWN, np.int8)
    assert sorted(np.bincount(stratified(nothing, np.arange(33), 4))) == [8, 8, 8, 9]


def test_too_few_patients() -> None:
    with pytest.raises(UserError, match="expected at least 3 patients for training and validation in 3 folds, got 2"):
        stratified(np.zeros((5, 1), np.int8), np.array(["a", "a", "b", "b", "b"]), 3)


def test_folds_of_the_published_vinbigdata(real_data: Path) -> None:
    told = annotations.read(str(real_data / "vinbigdata" / "train.csv"))
    labels = rater_agreement.labels(told.boxes.to_pylist(), schema.VINBIGDATA_FINDINGS)
    fold = stratified(labels, pa.chunked_array([told.images]), 5)
    counts = np.array([(labels[fold == number] == 1).sum(0) for number in range(5)])
    assert np.bincount(fold).tolist() == [3000] * 5
    assert np.ptp(counts, axis=0).max() <= 2
