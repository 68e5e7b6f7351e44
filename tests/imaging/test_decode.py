"""Decode valid, unusual and damaged images: the pixels are right, or the file is rejected with the reason."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from cxr.errors import ImageRejectedError
from cxr.imaging.decode import decode, to_bits
from cxr.imaging.png_jpeg import decode_mask
from tests.odd_files import OddFile, encoded, odd_files, radiograph

ODD = odd_files()
GOOD = [file for file in ODD if file.reason is None]


def test_there_are_more_than_fifty_kinds_of_odd_files() -> None:
    assert len({file.name for file in ODD}) == len(ODD) > 80
    assert len([file for file in ODD if file.reason]) > 50


@pytest.mark.parametrize("file", ODD, ids=lambda file: file.name)
def test_odd_file_is_decoded_or_rejected_with_its_reason(file: OddFile) -> None:
    if file.reason is not None:
        with pytest.raises(ImageRejectedError) as rejection:
            decode(file.data)
        assert file.reason in str(rejection.value)
        assert "Doe" not in str(rejection.value)
        return
    pixels = decode(file.data).pixels
    assert pixels.shape == (96, 80)
    assert pixels.dtype in (np.uint8, np.uint16)
    shade = radiograph().astype(float) * (-1 if file.name == "monochrome1.dcm" else 1)
    assert np.corrcoef(pixels.ravel(), shade.ravel())[0, 1] > 0.7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_png_is_exact_without_opencv(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (40, 30), dtype, endpoint=True)
    for filters in (cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_ALL_FILTERS, cv2.IMWRITE_PNG_FILTER_PAETH):
        _, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_FILTER, filters])
        with monkeypatch.context() as patched:
            patched.setattr(cv2, "imdecode", None)
            found = decode(data.tobytes()).pixels
        assert found.dtype == dtype
        assert (found == pixels).all()


@pytest.mark.parametrize("name", ["gray.png", "rgb_gray.png", "rgba.png", "gray_alpha.png", "png_named.dcm"])
def test_gray_pixels_are_unchanged(name: str) -> None:
    (file,) = [file for file in ODD if file.name == name]
    np.testing.assert_array_equal(decode(file.data).pixels, radiograph())


def test_sixteen_bits_are_preserved() -> None:
    pixels = radiograph(16)
    np.testing.assert_array_equal(decode(encoded(pixels)).pixels, pixels)


def test_one_bit_uses_the_full_range() -> None:
    pixels = radiograph() > 128
    np.testing.assert_array_equal(decode(encoded(Pillow.fromarray(pixels))).pixels, pixels * np.uint8(255))


def test_jpeg_is_close_to_its_source_and_not_rotated() -> None:
    (rotated,) = [file for file in ODD if file.name == "exif_rotated.jpg"]
    difference = decode(rotated.data).pixels.astype(int) - radiograph()
    assert np.abs(difference).mean() < 6


def test_a_faint_tint_is_not_a_color_photograph() -> None:
    gray = radiograph()
    tinted = np.dstack([gray, gray, np.maximum(gray, 20)])
    assert np.abs(decode(encoded(tinted)).pixels.astype(int) - gray).max() <= 10


def test_to_bits() -> None:
    eight = np.arange(256, dtype=np.uint8)[None]
    sixteen = to_bits(eight, 16)
    assert (sixteen.dtype, sixteen[0, 0], sixteen[0, -1]) == (np.uint16, 0, 65535)
    np.testing.assert_array_equal(to_bits(sixteen, 8), eight)
    assert to_bits(eight, 8) is eight
    everything = np.arange(65536, dtype=np.uint16)[None]
    np.testing.assert_array_equal(to_bits(everything, 8), (everything.astype(int) + 128) // 257)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_are_decoded_or_rejected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(GOOD[rng.integers(len(GOOD))].data)
        for place in rng.integers(0, min(len(data), rng.choice([600, 10**9])), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        cut = rng.integers(len(data)) if rng.random() < 0.2 else len(data)
        try:
            pixels = decode(bytes(data[:cut])).pixels
        except ImageRejectedError:
            continue
        assert pixels.ndim == 2
        assert pixels.dtype in (np.uint8, np.uint16)


def test_real_png_files_decode_as_with_pillow(real_data: Path) -> None:
    for path in sorted((real_data / "chestxray14" / "images").glob("*.png"))[::40]:
        with Pillow.open(path) as picture:
            expected = np.asarray(picture.convert("L"))
        np.testing.assert_array_equal(decode(path.read_bytes()).pixels, expected)


def test_twelve_bits_in_a_16_bit_png_use_the_full_range() -> None:
    stored = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert (decode(encoded(stored)).pixels == stored * 16).all()


# ---- Raw images of the JSRT database


def _raw(stored: np.ndarray) -> bytes:
    return stored.astype(">u2").tobytes()


def test_raw_jsrt_is_inverted_and_uses_the_full_range() -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (2048, 2048), np.uint16)
    stored[0, :3], stored[5, 7] = (0, 4095, 2048), 1000
    pixels = decode(_raw(stored)).pixels
    assert (pixels.shape, pixels.dtype) == ((2048, 2048), np.uint16)
    assert pixels[0, :2].tolist() == [65535, 0]
    np.testing.assert_allclose(pixels, (4095 - stored.astype(int)) * 65535 / 4095, atol=1)


def test_raw_jsrt_with_the_first_bytes_of_an_old_dicom_is_raw_jsrt() -> None:
    stored = np.full((2048, 2048), 3000, np.uint16)
    stored[0, :4] = (0x0200, 0x0000, 0x0800, 0x0500)
    assert decode(_raw(stored)).pixels[0, 0] == (4095 - 512) * 65535 // 4095


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (np.full((2048, 2048), 4096), "unsupported file type"),
        (np.zeros((2048, 2048)), "only zero bytes"),
        (np.full((2048, 2048), 77), "blank image"),
        (np.full((2048, 2047), 77), "unsupported file type"),
    ],
    ids=["13 bits", "zeros", "blank", "a column less"],
)
def test_files_that_only_resemble_raw_jsrt_are_rejected(stored: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        decode(_raw(stored))


# ---- GIF, for masks


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_gif_masks_of_any_palette_are_exact(mode: str) -> None:
    mask = np.where(radiograph() > 128, 255, 0).astype(np.uint8)
    data = encoded(Pillow.fromarray(mask).convert(mode), "GIF")
    np.testing.assert_array_equal(decode_mask(data), mask)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("color", [(128, 0, 0), (0, 0, 255)])
def test_masks_may_have_any_color_and_size(kind: str, color: tuple[int, int, int]) -> None:
    """labelme and Pascal VOC write palettes; a large mask is not a color photograph."""
    mask = Pillow.fromarray(np.tri(64, dtype=np.uint8), mode="P")
    mask.putpalette([0, 0, 0, *color])
    for picture in (mask, mask.convert("RGB")):
        np.testing.assert_array_equal(decode_mask(encoded(picture, kind)), np.tri(64) * max(color))


def _gifs() -> dict[str, tuple[bytes, str]]:
    gray = radiograph()
    whole, other = encoded(gray, "GIF"), Pillow.fromarray(255 - gray)
    large = whole[:6] + b"\xff\xff\xff\xff" + whole[10:]
    frame = whole.index(b"\x2c\0\0\0\0")
    return {
        "cut in its header": (whole[:9], "truncated GIF"),
        "cut in half": (whole[: len(whole) // 2], "damaged GIF"),
        "bomb": (large, "too large"),
        "bomb of a frame": (whole[: frame + 5] + b"\xff\xff\xff\xff" + whole[frame + 9 :], "damaged GIF"),
        "animated": (encoded(Pillow.fromarray(gray), "GIF", save_all=True, append_images=[other]), "multi-frame"),
        "small": (encoded(gray[:4, :4], "GIF"), "too small"),
    }


@pytest.mark.parametrize(("data", "reason"), _gifs().values(), ids=_gifs().keys())
def test_damaged_gifs_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        decode_mask(data)
