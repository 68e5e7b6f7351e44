"""Round trip of masks through run-length codes; invalid codes are rejected with the reason."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cxr.errors import ImageRejectedError
from cxr.sources import rle

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(MASKS)
def test_round_trip_of_any_mask(mask: np.ndarray) -> None:
    assert np.array_equal(rle.decode(rle.encode(mask), *mask.shape), mask)


@given(MASKS, st.booleans())
def test_round_trip_of_the_first_and_the_last_pixel(mask: np.ndarray, value: bool) -> None:
    mask[0, 0] = mask[-1, -1] = value
    assert np.array_equal(rle.decode(rle.encode(mask), *mask.shape), mask)


def test_runs_are_relative_and_column_major() -> None:
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
        ("1 two", "not only integers"),
        ("1 2.5", "not only integers"),
        ("3 -1", "negative"),
        ("10 7", "exceeds the image"),
        (f"1 {2**63 - 1} 1 {2**63 - 1}", "exceeds the image"),
        (f"1 {2**70}", "not only integers"),
    ],
)
def test_invalid_codes_are_rejected(code: str, trouble: str) -> None:
    with pytest.raises(ImageRejectedError, match=trouble):
        rle.decode(code, 4, 4)


@given(MASKS)
def test_code_does_not_depend_on_memory_layout(mask: np.ndarray) -> None:
    turned = np.asfortranarray(mask)
    assert rle.encode(mask) == rle.encode(turned) == rle.encode(np.pad(mask, 3)[3:-3, 3:-3])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_mask_without_pixels_is_empty(shape: tuple[int, int]) -> None:
    assert rle.encode(np.ones(shape, bool)) == rle.EMPTY


@pytest.mark.slow
def test_round_trip_of_all_published_codes(real_data: Path) -> None:
    """Also with the last pixel set, which some encoders drop."""
    codes = published_codes(real_data)
    assert len(codes) == 12_954
    assert codes.count(rle.EMPTY) == 9_378
    for code in set(codes):
        mask = rle.decode(code, 1024, 1024)
        assert rle.encode(mask) == code
        mask[-1, -1] = True
        assert np.array_equal(rle.decode(rle.encode(mask), 1024, 1024), mask)


def test_round_trip_of_500_published_masks_per_second(real_data: Path) -> None:
    codes = [code for code in published_codes(real_data) if code != rle.EMPTY][:100]
    masks = [np.ascontiguousarray(rle.decode(code, 1024, 1024)) for code in codes]
    seconds = []
    for _ in range(4):
        start = time.process_time()
        for mask in masks:
            rle.decode(rle.encode(mask), 1024, 1024)
        seconds.append(time.process_time() - start)
    assert len(masks) / min(seconds) >= 500


def published_codes(real_data: Path) -> list[str]:
    with (real_data / "siim" / "train-rle.csv").open() as file:
        return [line[1].strip() for line in csv.reader(file)][1:]


ABSOLUTE = pytest.mark.parametrize(("form", "axes"), [("absolute", (1, 0)), ("absolute-rows", (0, 1))])


@ABSOLUTE
@given(mask=MASKS)
def test_absolute_codes_of_any_mask(form: rle.Form, axes: tuple[int, int], mask: np.ndarray) -> None:
    flat = np.flatnonzero(mask.transpose(axes)).tolist()
    code = " ".join(f"{pixel + 1} 1" for pixel in flat) or rle.EMPTY
    assert np.array_equal(rle.decode(code, mask.shape[0], mask.shape[1], form), mask)


@pytest.mark.parametrize(
    ("code", "form", "reason"),
    [
        ("0 3", "absolute", "expected first pixels from 1, got 0"),
        ("9 3", "absolute-rows", "exceeds the image"),
        ("1 2 3", "absolute", "got 3 values"),
        ("1 1 2 2", "polygon", "expected polygons as pairs of numbers"),
        ("1 1 2 x 3 3", "polygon", "expected polygons as pairs of numbers"),
        ("1 1", "coco", "expected the form relative, absolute, absolute-rows, polygon, got 'coco'"),
    ],
)
def test_codes_in_other_forms_are_rejected_with_the_reason(code: str, form: rle.Form, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        rle.decode(code, 2, 5, form)


def test_absolute_order_tells_the_forms_apart() -> None:
    assert rle.has_absolute_order("3 4 9 2") is True
    assert rle.has_absolute_order("9 4 3 2") is False
    assert rle.has_absolute_order("0 4 9 2") is False  # pixels count from 1
    assert rle.has_absolute_order("3 4") is None


def test_compressed_counts_are_those_of_pycocotools() -> None:
    """The text is `pycocotools.mask.encode` (2.0.11) of this mask."""
    mask = np.zeros((37, 53), bool)
    mask[5:20, 10:40] = mask[30:, 50:] = True
    counts = rle.uncompressed("g;?f0000000000000000000000000000000000000000000000000000000000[<HmC000")
    assert sum(counts[:-1]) + counts[-1] == mask.size
    assert np.array_equal(rle.decode(rle.from_counts(counts), *mask.shape), mask)
    assert (rle.from_counts([6]), rle.from_counts([0, 6])) == (rle.EMPTY, "0 6")
    for damaged in ("g;?f", "~", "\x00", "o" * 20):
        with pytest.raises(ValueError, match="not a compressed code"):
            rle.uncompressed(damaged)


def test_polygons_contain_the_pixels_whose_centers_are_inside() -> None:
    mask = rle.decode("1 1 4 1 4 3 1 3;-5 3.4 2.5 3.4 2.5 9 -5 9", 5, 6, "polygon")
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = expected[3:, :2] = True
    assert np.array_equal(mask, expected)
