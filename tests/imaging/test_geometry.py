"""Fitting into a square: positions of pixels and masks, and every coordinate maps back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.imaging.geometry import ResizeTransform, fit, fit_mask, mask_to_original

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
def test_image_edges_are_whole_stored_pixels(height: int, width: int, size: int) -> None:
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
    assert frame == ResizeTransform(4.0, 4.0, -0.0, -0.0)
    assert square.dtype == dtype
    assert np.abs(square.astype(float) - top / 2).max() <= 1


def test_a_dot_is_where_its_transform_says() -> None:
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


def test_a_mask_matches_its_image() -> None:
    mask = np.zeros((301, 173), bool)
    mask[40:200, 60:120] = True
    square, frame = fit(mask.astype(np.uint8) * 255, 64)
    fitted = fit_mask(mask, 64, frame)
    assert fitted.dtype == bool
    np.testing.assert_array_equal(fitted, square >= 128)
    area_px = fitted.sum() * frame.x_scale * frame.y_scale
    assert area_px == pytest.approx(mask.sum(), rel=0.06)


def test_transform_survives_as_dict() -> None:
    _, frame = fit(np.zeros((30, 70), np.uint8), 32)
    assert ResizeTransform(**frame.as_dict()) == frame


def discs(height: int, width: int, seed: int) -> np.ndarray:
    """Bool (height, width): three smooth blobs, some of which touch the edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        center_y, center_x = rng.uniform(0, (height, width))
        mask |= (y + 0.5 - center_y) ** 2 + (x + 0.5 - center_x) ** 2 < (0.25 * min(height, width)) ** 2
    return mask


def near_outline(mask: np.ndarray, by_px: float) -> np.ndarray:
    """Bool (H, W): pixels within `by_px` (rows, columns; rounded up) of the mask's outline."""
    kernel = np.ones((2 * int(np.ceil(by_px)) + 1,) * 2, np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel) != cv2.erode(mask.astype(np.uint8), kernel)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(60, 400), width=st.integers(60, 400), size=st.integers(48, 300), seed=st.integers(0, 99))
def test_masks_map_back_to_the_original(height: int, width: int, size: int, seed: int) -> None:
    mask = discs(height, width, seed)
    _, frame = fit(np.zeros((height, width), np.uint8), size)
    stored = fit_mask(mask, size, frame)
    back = mask_to_original(stored, frame, height, width)
    assert back.shape == mask.shape
    assert back.dtype == bool
    assert not ((back != mask) & ~near_outline(mask, max(frame.x_scale, frame.y_scale))).any()
    assert (fit_mask(back, size, frame) != stored).mean() < 0.005


def test_a_mask_of_whole_pixels_maps_back_exactly() -> None:
    mask = np.kron(np.random.default_rng(0).random((6, 9)) < 0.5, np.ones((12, 12), bool))
    _, frame = fit(np.zeros(mask.shape, np.uint8), 108)
    np.testing.assert_array_equal(mask_to_original(fit_mask(mask, 108, frame), frame, *mask.shape), mask)
    full = mask_to_original(np.ones((27, 27), bool), fit(np.zeros(mask.shape, np.uint8), 27)[1], *mask.shape)
    assert full.all()


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (91, 64)])
def test_padding_has_no_influence_on_the_original(shape: tuple[int, int]) -> None:
    _, frame = fit(np.zeros(shape, np.uint8), 64)
    inner = fit_mask(np.ones(shape, bool), 64, frame)
    assert mask_to_original(inner, frame, *shape).all()
    assert not mask_to_original(~inner, frame, *shape).any()


def test_probabilities_cross_one_half_between_pixels() -> None:
    shares = np.array([[0.0, 0.25, 0.75, 1.0]] * 4)
    back = mask_to_original(shares, ResizeTransform(10, 10), 40, 40)
    assert back[:, 20:].all()
    assert not back[:, :20].any()
    confident = mask_to_original(np.array([[0.0, 0.4, 1.0, 1.0]] * 4), ResizeTransform(10, 10), 40, 40)
    assert confident[0].argmax() in (16, 17)  # at 15 + 10 · (0.5 − 0.4) / (1 − 0.4)


def test_a_crop_maps_back_to_where_it_was_cut() -> None:
    back = mask_to_original(np.ones((16, 16), bool), ResizeTransform(2, 2, 10, -4), 50, 60)
    wanted = np.zeros((50, 60), bool)
    wanted[:28, 10:42] = True
    np.testing.assert_array_equal(back, wanted)
    assert not mask_to_original(np.ones((16, 16), bool), ResizeTransform(2, 2, 100, 0), 50, 60).any()


def test_transforms_compose() -> None:
    points = np.random.default_rng(0).uniform(0, 50, (9, 2))
    crop, outer = ResizeTransform(0.5, 0.25, 3, -7), ResizeTransform(4, 3, -1, 2)
    np.testing.assert_allclose(crop.then(outer).to_original(points), outer.to_original(crop.to_original(points)))
