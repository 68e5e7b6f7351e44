"""Arrays and data sets in memory are decoded like files with the same content."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest

from cxr.errors import ImageRejectedError
from cxr.imaging.arrays import image_from_array
from cxr.imaging.decode import decode
from cxr.imaging.dicom import encode_dataset
from cxr.imaging.dicom_signature import begins_like_data_set, has_preamble
from tests.odd_files import OddFile, encoded, odd_files, radiograph


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_pixels_are_those_of_a_png_file(bits: int) -> None:
    pixels = radiograph(bits)
    expected = decode(encoded(pixels)).pixels
    assert image_from_array(pixels).pixels.dtype == expected.dtype
    np.testing.assert_array_equal(image_from_array(pixels).pixels, expected)
    np.testing.assert_array_equal(image_from_array(pixels[..., None]).pixels, expected)
    np.testing.assert_array_equal(image_from_array(pixels.astype(pixels.dtype.newbyteorder())).pixels, expected)


def test_gray_in_three_or_four_channels_is_gray() -> None:
    rgb = np.repeat(radiograph()[..., None], 3, 2)
    np.testing.assert_array_equal(image_from_array(rgb).pixels, radiograph())
    with_alpha = np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 9, np.uint8)], 2)
    np.testing.assert_array_equal(image_from_array(with_alpha).pixels, radiograph())


def test_red_is_the_first_channel() -> None:
    red = np.repeat(radiograph()[..., None], 3, 2)
    red[:8, :8] = (200, 0, 0)  # few enough pixels for a marker
    np.testing.assert_array_equal(image_from_array(red).pixels, decode(encoded(red)).pixels)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_use_the_full_range(kind: type) -> None:
    pixels = image_from_array((radiograph() / 255).astype(kind)).pixels
    assert pixels.dtype == np.uint16
    np.testing.assert_allclose(pixels / 257, radiograph(), atol=0.2)
    dark = image_from_array(np.array([[0.0, 0.25]], np.float32)).pixels  # a dark image stays dark
    assert dark.tolist() == [[0, 16384]]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[0.0, 2.0]]), "float array: expected values from 0 to 1, got 0 to 2; scale"),
        (np.array([[-0.5, 1.0]]), "float array: expected values from 0 to 1, got -0.5 to 1"),
        (np.array([[0.0, np.nan]]), "float array: expected values from 0 to 1, got nan to nan"),
        (np.zeros((9, 9), bool), "bool array: expected uint8, uint16, or floats from 0 to 1; convert"),
        (np.zeros((9, 9), np.int16), "int16 array: expected uint8"),
        (np.zeros(9, np.uint8), r"array of shape \(9,\): expected \(height, width\)"),
        (np.zeros((0, 9), np.uint8), r"array of shape \(0, 9\)"),
        (np.zeros((9, 9, 2), np.uint8), r"array of shape \(9, 9, 2\)"),
    ],
)
def test_other_arrays_are_rejected_with_what_to_do(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        image_from_array(array)


def is_dicom(file: OddFile) -> bool:
    return has_preamble(file.data) or begins_like_data_set(file.data)


def test_data_sets_are_decoded_like_their_files() -> None:
    compared = 0
    for file in filter(is_dicom, odd_files()):
        dataset = pydicom.dcmread(io.BytesIO(file.data), force=True)
        if file.reason is None:
            image, expected = decode(encode_dataset(dataset)), decode(file.data)
            np.testing.assert_array_equal(image.pixels, expected.pixels, file.name)
            assert (image.spacing_mm, image.view, image.study_id) == (
                expected.spacing_mm,
                expected.view,
                expected.study_id,
            )
        else:
            with pytest.raises(ImageRejectedError):
                decode(encode_dataset(dataset))
        compared += 1
    assert compared > 30
