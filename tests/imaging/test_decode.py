"""Decoding of pictures, whole, odd and broken: pixels right, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from cxr.errors import Refused
from cxr.imaging.decode import decode, to_bits
from tests.odd_files import OddFile, encoded, odd_files, radiograph

ODD = odd_files()
GOOD = [file for file in ODD if file.reason is None]


def test_there_are_fifty_kinds_and_more() -> None:
    assert len({file.name for file in ODD}) == len(ODD) > 80
    assert len([file for file in ODD if file.reason]) > 50


@pytest.mark.parametrize("file", ODD, ids=lambda file: file.name)
def test_odd_file_is_decoded_or_refused_with_its_reason(file: OddFile) -> None:
    if file.reason is not None:
        with pytest.raises(Refused) as refused:
            decode(file.data)
        assert file.reason in str(refused.value)
        assert "Doe" not in str(refused.value)
        return
    pixels = decode(file.data).pixels
    assert pixels.shape == (96, 80)
    assert pixels.dtype in (np.uint8, np.uint16)
    shade = radiograph().astype(float) * (-1 if file.name == "monochrome1.dcm" else 1)
    assert np.corrcoef(pixels.ravel(), shade.ravel())[0, 1] > 0.7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_png_needs_no_opencv_and_is_exact(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (40, 30), dtype, endpoint=True)
    for filters in (cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_ALL_FILTERS, cv2.IMWRITE_PNG_FILTER_PAETH):
        _, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_FILTER, filters])
        with monkeypatch.context() as patched:
            patched.setattr(cv2, "imdecode", None)
            found = decode(data.tobytes()).pixels
        assert found.dtype == dtype
        assert (found == pixels).all()


@pytest.mark.parametrize("name", ["gray.png", "rgb_gray.png", "rgba.png", "gray_alpha.png", "png_named.dcm"])
def test_gray_pixels_stay_what_they_are(name: str) -> None:
    (file,) = [file for file in ODD if file.name == name]
    np.testing.assert_array_equal(decode(file.data).pixels, radiograph())


def test_sixteen_bits_stay_sixteen_bits() -> None:
    pixels = radiograph(16)
    np.testing.assert_array_equal(decode(encoded(pixels)).pixels, pixels)


def test_one_bit_uses_the_full_range() -> None:
    pixels = radiograph() > 128
    np.testing.assert_array_equal(decode(encoded(Pillow.fromarray(pixels))).pixels, pixels * np.uint8(255))


def test_jpeg_is_near_its_source_and_not_rotated() -> None:
    (rotated,) = [file for file in ODD if file.name == "exif_rotated.jpg"]
    difference = decode(rotated.data).pixels.astype(int) - radiograph()
    assert np.abs(difference).mean() < 6


def test_a_faint_tint_is_no_colour_photograph() -> None:
    gray = radiograph()
    tinted = np.dstack([gray, gray, np.maximum(gray, 20)])
    assert np.abs(decode(encoded(tinted)).pixels.astype(int) - gray).max() <= 10


def test_bits() -> None:
    eight = np.arange(256, dtype=np.uint8)[None]
    sixteen = to_bits(eight, 16)
    assert (sixteen.dtype, sixteen[0, 0], sixteen[0, -1]) == (np.uint16, 0, 65535)
    np.testing.assert_array_equal(to_bits(sixteen, 8), eight)
    assert to_bits(eight, 8) is eight
    everything = np.arange(65536, dtype=np.uint16)[None]
    np.testing.assert_array_equal(to_bits(everything, 8), (everything.astype(int) + 128) // 257)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_give_an_image_or_a_reason(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(GOOD[rng.integers(len(GOOD))].data)
        for place in rng.integers(0, min(len(data), rng.choice([600, 10**9])), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        cut = rng.integers(len(data)) if rng.random() < 0.2 else len(data)
        try:
            pixels = decode(bytes(data[:cut])).pixels
        except Refused:
            continue
        assert pixels.ndim == 2
        assert pixels.dtype in (np.uint8, np.uint16)


def test_real_png_files_hold_what_pillow_reads(real_data: Path) -> None:
    for path in sorted((real_data / "chestxray14" / "images").glob("*.png"))[::40]:
        with Pillow.open(path) as picture:
            expected = np.asarray(picture.convert("L"))
        np.testing.assert_array_equal(decode(path.read_bytes()).pixels, expected)


def test_twelve_bits_in_a_16_bit_png_use_the_full_range() -> None:
    stored = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert (decode(encoded(stored)).pixels == stored * 16).all()
