"""Masks survive their run-length codes; broken codes are refused with a reason."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cxr.errors import Refused
from cxr.sources import rle

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(MASKS)
def test_any_mask_survives(mask: np.ndarray) -> None:
    assert np.array_equal(rle.decode(rle.encode(mask), *mask.shape), mask)


@given(MASKS, st.booleans())
def test_the_first_and_the_last_pixel_survive(mask: np.ndarray, value: bool) -> None:
    mask[0, 0] = mask[-1, -1] = value
    assert np.array_equal(rle.decode(rle.encode(mask), *mask.shape), mask)


def test_runs_go_down_the_columns_from_the_end_of_the_last_one() -> None:
    mask = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1]], bool)  # by columns: 0 1 0, 1 1 0, 0 0 1
    assert rle.encode(mask) == "1 1 1 2 3 1"
    assert np.array_equal(rle.decode("1 1 1 2 3 1", 3, 3), mask)


def test_height_and_width_are_not_swapped() -> None:
    mask = rle.decode("5 5", height=5, width=2)
    assert mask.shape == (5, 2)
    assert mask[:, 1].all()
    assert not mask[:, 0].any()


@pytest.mark.parametrize("empty", ["-1", " -1"])
def test_minus_one_is_an_empty_mask(empty: str) -> None:
    assert rle.decode(empty, 4, 6).shape == (4, 6)
    assert not rle.decode(empty, 4, 6).any()
    assert rle.encode(np.zeros((4, 6), bool)) == "-1"


@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("1 2 3", "3 values"),
        ("", "0 values"),
        ("1 two", "whole numbers"),
        ("1 2.5", "whole numbers"),
        ("3 -1", "negative"),
        ("10 7", "over the end"),
        (f"1 {2**63 - 1} 1 {2**63 - 1}", "over the end"),
        (f"1 {2**70}", "whole numbers"),
    ],
)
def test_broken_codes_are_refused(code: str, trouble: str) -> None:
    with pytest.raises(Refused, match=trouble):
        rle.decode(code, 4, 4)


def test_all_published_codes_survive(real_data) -> None:
    with (real_data / "siim" / "train-rle.csv").open() as file:
        codes = [line[1] for line in csv.reader(file)][1:]
    assert len(codes) == 12_954
    for code in codes:
        assert rle.encode(rle.decode(code, 1024, 1024)) == code.strip()
    assert sum(code.strip() == rle.EMPTY for code in codes) == 9_378
