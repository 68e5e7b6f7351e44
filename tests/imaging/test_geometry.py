"""Fitting into a square: positions of pixels and masks, and every coordinate maps back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.imaging.geometry import ResizeTransform, fit, fit_mask, map_to_original, mask_to_original, place

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
    assert ResizeTransform.from_dict(frame.as_dict()) == frame


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


# ---- Transforms that turn the image


def turned(height: int, width: int, size: int, degrees: float, zoom: float = 1.0) -> ResizeTransform:
    """From a square of `size` pixels to an image, whose long side fills it before it is turned around its middle."""
    step = zoom * max(height, width) / size
    cos, sin = step * np.cos(np.radians(degrees)), step * np.sin(np.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    middle = np.array([width, height]) / 2 - linear @ (size / 2, size / 2)
    return ResizeTransform.from_matrix(np.column_stack([linear, middle]))


@settings(deadline=None, max_examples=30)
@given(matrix=st.lists(st.floats(-3, 3), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_points_and_boxes_map_through_any_transform(matrix: list[float], seed: int) -> None:
    skewed = 5 * np.eye(2, 3) + np.array(matrix).reshape(2, 3)
    frame, rng = ResizeTransform.from_matrix(skewed), np.random.default_rng(seed)
    points = rng.uniform(0, 500, (20, 2))
    np.testing.assert_allclose(frame.to_original(points), points @ skewed[:, :2].T + skewed[:, 2])
    for back in (frame.from_original, frame.inverse().to_original):
        np.testing.assert_allclose(back(frame.to_original(points)), points, atol=1e-6)
    outer = ResizeTransform(2, 3, 4, 5, 0.5, -0.5)
    np.testing.assert_allclose(frame.then(outer).to_original(points), outer.to_original(frame.to_original(points)))
    low, high = np.minimum(points[:10], points[10:]), np.maximum(points[:10], points[10:])
    boxes = frame.boxes_to_original(np.hstack([low, high]))
    inside = frame.to_original(low + rng.random((10, 2)) * (high - low))
    assert (boxes[:, :2] <= inside + 1e-9).all()
    assert (inside <= boxes[:, 2:] + 1e-9).all()
    corners = [low, high, np.c_[low[:, 0], high[:, 1]], np.c_[high[:, 0], low[:, 1]]]
    np.testing.assert_allclose(boxes[:, :2], np.min([frame.to_original(corner) for corner in corners], 0))


def test_rows_of_earlier_versions_have_no_skews() -> None:
    old = {"x_scale": 2.0, "y_scale": 3.0, "x_offset": 4.0, "y_offset": 5.0}
    assert ResizeTransform.from_dict(old) == ResizeTransform(2, 3, 4, 5)
    assert ResizeTransform.from_dict(old | {"x_skew": None, "y_skew": None}) == ResizeTransform(2, 3, 4, 5)


def test_a_dot_of_a_turned_image_is_where_its_transform_says() -> None:
    pixels = np.zeros((300, 200), np.uint16)
    pixels[90:96, 30:36] = 65535
    frame = turned(300, 200, 100, 20, 1.3)
    square = place(pixels, 100, frame)
    y, x = np.unravel_index(square.argmax(), square.shape)
    assert square.dtype == np.uint16
    assert np.abs(frame.to_original(np.array([[x, y]]) + 0.5) - [33, 93]).max() < frame.steps[0]
    outside = frame.to_original(np.argwhere(np.ones((100, 100)))[:, ::-1] + 0.5)
    beyond = ((outside < -4) | (outside > [204, 304])).any(1).reshape(100, 100)
    assert not place(np.full((300, 200), 255, np.uint8), 100, frame)[beyond].any()


@pytest.mark.parametrize(("size", "least"), [(512, 0.95), (1024, 0.85)])
def test_a_turned_image_is_as_sharp_as_a_resized_one(size: int, least: float) -> None:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(0, 1, (1024, 1024)), (0, 0), 0.8)
    pixels = (128 + 25 * texture / texture.std()).clip(0, 255).astype(np.uint8)

    def sharpness(square: np.ndarray) -> float:
        middle = square[size // 4 : -size // 4, size // 4 : -size // 4].astype(float)
        return sum((np.diff(middle, axis=axis) ** 2).mean() for axis in (0, 1))

    resized, turned_once = fit(pixels, size)[0], place(pixels, size, turned(1024, 1024, size, 3))
    assert least < sharpness(turned_once) / sharpness(resized) < 1.1
    small = place(pixels, 128, turned(1024, 1024, 128, 3))
    assert sharpness(cv2.resize(small, (size, size))) < 0.2 * sharpness(turned_once)


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(60, 400),
    width=st.integers(60, 400),
    size=st.integers(48, 300),
    degrees=st.floats(-30, 30),
    seed=st.integers(0, 99),
)
def test_masks_of_turned_images_map_back(height: int, width: int, size: int, degrees: float, seed: int) -> None:
    mask, frame = discs(height, width, seed), turned(height, width, size, degrees, 1.5)  # shows the whole image
    back = mask_to_original(fit_mask(mask, size, frame), frame, height, width)
    edges = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    near = near_outline(edges, 1.5 * max(frame.steps))[1:-1, 1:-1]
    assert not ((back != mask) & ~near).any()


def test_values_do_not_reach_beyond_a_turned_square() -> None:
    frame = turned(200, 200, 50, 30, 0.5)
    back = map_to_original(np.ones((50, 50)), frame, 200, 200)
    inside = frame.from_original(np.argwhere(np.ones((200, 200)))[:, ::-1] + 0.5)
    expected = ((inside >= 0) & (inside <= 50)).all(1).reshape(200, 200)
    np.testing.assert_array_equal(back, expected)
