"""Fitting into a square: where pixels and masks land, and that every coordinate maps back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.imaging.geometry import Frame, fit, fit_mask

SIDE = st.integers(1, 400)


@settings(deadline=None, max_examples=60)
@given(height=SIDE, width=SIDE, size=st.integers(16, 300), seed=st.integers(0, 99))
def test_points_map_to_the_square_and_back(height: int, width: int, size: int, seed: int) -> None:
    square, frame = fit(np.zeros((height, width), np.uint8), size)
    assert square.shape == (size, size)
    points_px = np.random.default_rng(seed).uniform(0, (width, height), (20, 2))
    stored_px = frame.from_original(points_px)
    assert stored_px.min() >= -1e-9
    assert stored_px.max() <= size + 1e-9
    np.testing.assert_allclose(frame.to_original(stored_px), points_px, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(height=SIDE, width=SIDE, size=st.integers(16, 300))
def test_image_edges_lie_on_whole_stored_pixels(height: int, width: int, size: int) -> None:
    square, frame = fit(np.full((height, width), 200, np.uint8), size)
    corners = frame.from_original(np.array([[0, 0], [width, height]]))
    np.testing.assert_allclose(corners, np.rint(corners), atol=1e-9)
    (left, top), (right, bottom) = np.rint(corners).astype(int)
    expected = np.zeros((size, size), np.uint8)
    expected[top:bottom, left:right] = 200
    np.testing.assert_array_equal(square, expected)
    assert abs(left - (size - right)) <= 1
    assert abs(top - (size - bottom)) <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_shrinking_averages_areas(dtype: type) -> None:
    top = np.iinfo(dtype).max
    checks = (np.indices((128, 128)).sum(0) % 2 * top).astype(dtype)
    square, frame = fit(checks, 32)
    assert frame == Frame(4.0, 4.0, -0.0, -0.0)
    assert square.dtype == dtype
    assert np.abs(square.astype(float) - top / 2).max() <= 1


def test_a_dot_lands_where_its_frame_says() -> None:
    pixels = np.zeros((300, 200), np.uint8)
    pixels[90:96, 30:36] = 255
    square, frame = fit(pixels, 100)
    y, x = np.argwhere(square == 255)[0]
    np.testing.assert_allclose(frame.to_original(np.array([[x, y]]) + 0.5), [[33, 93]], atol=frame.x_scale)
    assert frame.x_scale == 200 / 67
    assert frame.y_scale == 3.0


def test_small_images_are_enlarged() -> None:
    ramp = np.tile(np.arange(0, 200, 10, dtype=np.uint8), (20, 1))
    square, frame = fit(ramp, 80)
    assert frame.x_scale == 0.25
    assert np.all(np.diff(square[40].astype(int)) >= 0)
    assert len(np.unique(square)) > len(np.unique(ramp))


def test_mask_follows_its_image() -> None:
    mask = np.zeros((301, 173), bool)
    mask[40:200, 60:120] = True
    square, frame = fit(mask.astype(np.uint8) * 255, 64)
    fitted = fit_mask(mask, 64, frame)
    assert fitted.dtype == bool
    np.testing.assert_array_equal(fitted, square >= 128)
    area_px = fitted.sum() * frame.x_scale * frame.y_scale
    assert area_px == pytest.approx(mask.sum(), rel=0.06)


def test_frame_as_dict_makes_the_same_frame() -> None:
    _, frame = fit(np.zeros((30, 70), np.uint8), 32)
    assert Frame(**frame.as_dict()) == frame
