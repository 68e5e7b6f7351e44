"""Centered squares: where they lie, and that they are resized as TorchXRayVision does."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cxr.imaging.center_crop import CenterCrop, center_square


@pytest.mark.parametrize(
    ("shape", "corner"), [((5, 8), (2, 0)), ((9, 4), (0, 2)), ((6, 6), (0, 0)), ((4, 7), (1, 0))]
)
def test_the_square_is_centered_and_its_transform_leads_back(shape: tuple[int, int], corner: tuple[int, int]) -> None:
    square = center_square(np.zeros(shape, np.uint8), "area")
    assert (square.x, square.y) == corner
    assert square.side == min(shape)
    corners = square.transform(16).to_original(np.array([[0, 0], [16, 16]]))
    assert corners.tolist() == [list(corner), [corner[0] + square.side, corner[1] + square.side]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resampling_by_area_keeps_the_type_and_equals_opencv(dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (40, 64)).astype(dtype)
    resized = CenterCrop("area").loaded()(image).crop(image, 20)
    assert resized.dtype == dtype
    assert np.array_equal(resized, cv2.resize(image[:, 12:52], (20, 20), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("shape", [(301, 260), (128, 150), (64, 64), (40, 50)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gaussian_resampling_equals_torchxrayvision(shape: tuple[int, int], dtype: type) -> None:
    datasets = pytest.importorskip("torchxrayvision", reason="torchxrayvision is not installed").datasets
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    expected = datasets.XRayCenterCrop()(datasets.normalize(image, np.iinfo(dtype).max)[None])
    expected = datasets.XRayResizer(64)(expected)[0]
    resized = CenterCrop("gaussian").loaded()(image).crop(image, 64)
    assert resized.dtype == np.float32
    assert np.abs(resized * 2048 - 1024 - expected).max() < 1e-3


def test_a_uniform_image_stays_uniform_away_from_its_border() -> None:
    image = np.full((200, 200), 200, np.uint8)
    resized = center_square(image, "gaussian").crop(image, 50)
    assert np.allclose(resized[5:-5, 5:-5], 200 / 255, atol=1e-6)
    assert resized[0, 25] < resized[25, 25], "beyond the border is the mean of black and white"
