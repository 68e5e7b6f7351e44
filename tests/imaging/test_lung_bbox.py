"""The square around the lungs contains them and stays in the image, and every coordinate maps back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr import schema
from cxr.data.decode import make_rows
from cxr.imaging.geometry import ResizeTransform, fit
from cxr.imaging.lung_bbox import LungSquare, largest_two, lung_square, whole_image
from cxr.schema import PixelFormat
from cxr.sources import open_manifest


def lungs(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Bool (height, width), true in [y0, y1) x [x0, x1) of each box."""
    mask = np.zeros((height, width), bool)
    for y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def test_the_smallest_square_around_both_lungs() -> None:
    mask = lungs(100, 100, (20, 70, 20, 40), (25, 80, 55, 75))
    assert lung_square(mask, margin=0) == LungSquare(17, 20, 60)
    assert lung_square(mask, margin=0.1) == LungSquare(11, 14, 72)


@pytest.mark.parametrize(("box", "wanted"), [((10, 70, 0, 30), (0, 10)), ((10, 70, 75, 100), (40, 10))])
def test_a_square_is_moved_into_the_image(box: tuple[int, int, int, int], wanted: tuple[int, int]) -> None:
    assert lung_square(lungs(100, 100, box), margin=0) == LungSquare(*wanted, 60)


def test_a_square_longer_than_a_side_extends_beyond_it() -> None:
    found = lung_square(lungs(200, 100, (20, 180, 10, 60)), margin=0)
    assert found == LungSquare(-30, 20, 160)
    crop = found.crop(np.full((200, 100), 7, np.uint8), 160)
    assert (crop[:, 30:130] == 7).all()
    assert crop[:, :30].max() == crop[:, 130:].max() == 0


def test_specks_do_not_enlarge_the_square() -> None:
    mask = lungs(100, 100, (20, 70, 20, 40), (20, 70, 50, 70), (95, 97, 95, 97))
    assert lung_square(mask, margin=0) == LungSquare(20, 20, 50)
    one = lungs(100, 100, (20, 70, 20, 70), (95, 97, 95, 97))
    np.testing.assert_array_equal(largest_two(one), lungs(100, 100, (20, 70, 20, 70)))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 0, 0), "the lung mask is empty"),
        ((0, 5, 0, 10), "covers 0.5% of the image, expected at least 5%"),
        ((0, 100, 0, 90), "covers 90.0% of the image, expected at most 60%"),
    ],
)
def test_implausible_masks_give_the_whole_image(box: tuple[int, int, int, int], reason: str) -> None:
    found = lung_square(lungs(100, 100, box))
    assert (found.x, found.y, found.side) == (0, 0, 100)
    assert reason in found.reason


def test_cropping_the_whole_image_equals_fit() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90), np.uint8)
    square, frame = fit(pixels, 30)
    whole = whole_image(60, 90)
    np.testing.assert_array_equal(whole.crop(pixels, 30), square)
    assert whole.transform(30) == frame


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [20, 90])
def test_pixels_of_the_crop_are_where_its_transform_says(dtype: type, size: int) -> None:
    pixels = np.zeros((100, 100), dtype)
    pixels[40:50, 60:70] = np.iinfo(dtype).max
    square = lung_square(lungs(100, 100, (20, 80, 25, 75)), margin=0)
    crop = square.crop(pixels, size)
    assert (crop.dtype, crop.shape) == (dtype, (size, size))
    y, x = np.argwhere(crop == np.iinfo(dtype).max).mean(0)
    np.testing.assert_allclose(square.transform(size).to_original(np.array([[x, y]]) + 0.5), [[65, 45]], atol=1)


def test_real_lung_masks_are_plausible(real_data: Path) -> None:
    squares = []
    for archive in ("montgomery", "shenzhen"):
        manifest = open_manifest(str(real_data / archive)).table.slice(0, 40)
        for packed in make_rows(manifest, PixelFormat(128))[schema.MASKS].to_pylist():
            bits = np.unpackbits(np.frombuffer(packed[0][schema.MASK_BITS], np.uint8))
            squares.append(lung_square(bits.reshape(128, 128).astype(bool)))
    assert len(squares) == 80
    assert {square.reason for square in squares} == {""}
    assert min(square.side for square in squares) > 50


SIDE = st.integers(20, 300)


@settings(deadline=None, max_examples=100)
@given(height=SIDE, width=SIDE, size=st.integers(8, 400), margin=st.floats(0, 0.5), seed=st.integers(0, 10**6))
def test_boxes_map_back_and_the_lungs_are_inside(
    height: int, width: int, size: int, margin: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(2):
        (y0, y1), (x0, x1) = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
        mask[y0:y1, x0:x1] = True
    square = lung_square(mask, margin)
    frame = square.transform(size)
    boxes = rng.uniform(0, (width, height), (12, 2))
    np.testing.assert_allclose(frame.to_original(frame.from_original(boxes)), boxes, atol=1e-9)
    corners = frame.to_original(np.array([[0, 0], [size, size]]))
    np.testing.assert_allclose(corners, [[square.x, square.y], [square.x + square.side, square.y + square.side]])
    for start, length in ((square.x, width), (square.y, height)):
        inside = (start >= 0 and start + square.side <= length) or (start <= 0 and start + square.side >= length)
        assert inside
    y, x = np.nonzero(largest_two(mask)) if not square.reason else np.nonzero(np.ones_like(mask))
    assert square.x <= x.min() and x.max() < square.x + square.side  # noqa: PT018
    assert square.y <= y.min() and y.max() < square.y + square.side  # noqa: PT018


@settings(deadline=None, max_examples=60)
@given(height=SIDE, width=SIDE, stored=st.integers(32, 128), seed=st.integers(0, 10**6))
def test_a_square_of_stored_pixels_crops_the_original(height: int, width: int, stored: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = cv2.blur(rng.integers(0, 255, (height, width)).astype(np.uint8), (9, 9))
    _, frame = fit(original, stored)
    (x0, y0), side = rng.integers(0, stored // 2, 2).tolist(), int(rng.integers(stored // 4, stored // 2))
    square = LungSquare(x0, y0, side)
    on_original = square.on_original(frame, height, width)
    corners = frame.to_original(np.array([[x0, y0], [x0 + side, y0 + side]]))
    low, high = np.clip(corners, 0, (width, height))
    at = np.array([on_original.x, on_original.y])
    assert (at <= low + 1e-5).all()
    assert (at + on_original.side >= high - 1e-5).all()
    through = square.transform(size=50).then(frame)
    points = rng.uniform(0, 50, (8, 2))
    np.testing.assert_allclose(
        through.to_original(points), frame.to_original(square.transform(50).to_original(points))
    )


def test_the_whole_image_maps_to_the_whole_original() -> None:
    found = whole_image(64, 64, "the lung mask is empty").on_original(ResizeTransform(4, 4, 0, -28), 200, 256)
    assert found == LungSquare(0, -28, 256, "the lung mask is empty")
