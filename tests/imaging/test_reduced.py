"""Decoding at reduced resolution: the resized image differs by less than methods of resizing differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from imagecodecs import htj2k_encode, jpeg2k_encode
from numpy.testing import assert_array_equal
from PIL import Image as Pillow
from pydicom import Dataset, uid
from pydicom import Sequence as Items

from cxr import schema
from cxr.data.decode import ImageFormat, make_rows, make_rows_in_formats, rows_in_format
from cxr.errors import ImageRejectedError
from cxr.imaging import dicom_codestream, reduced
from cxr.imaging.decode import decode, inspect
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import ResizeTransform, fit
from cxr.imaging.image import EncodedImage, Image
from cxr.imaging.reduced import decode_to_fit
from cxr.schema import PixelFormat
from cxr.sources.manifest import manifest_table
from tests.odd_files import dataset, dicom, radiograph
from tests.odd_files import encoded as encoded_picture

WINDOW = {"BitsStored": 12, "HighBit": 11, "WindowCenter": "2048", "WindowWidth": "4096"}


def jpeg_2000(pixels: np.ndarray, lossy: bool = False, **tags: Any) -> bytes:
    level = 70 if lossy else 0
    codestream = jpeg2k_encode(pixels, level, reversible=not lossy, codecformat="j2k", bitspersample=12)
    return dicom(dataset(pixels, **WINDOW | tags), uid.JPEG2000, bytes(codestream))


@pytest.fixture
def halvings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reductions that are decoded while a test runs."""
    seen: list[int] = []
    decode_reduced = dicom_codestream.decode_reduced

    def recorded(coded: bytes, header: dicom_codestream.Codestream, number: int) -> np.ndarray | None:
        seen.append(number)
        return decode_reduced(coded, header, number)

    monkeypatch.setattr("cxr.imaging.dicom_pixels.decode_reduced", recorded)
    return seen


def rms(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square of the difference, in levels of 8 bits."""
    return float(np.sqrt(np.square(first.astype(np.float64) - second).mean())) / 257


def resized(pixels: np.ndarray, size: int, method: Pillow.Resampling) -> np.ndarray:
    picture = Pillow.fromarray(pixels.astype(np.float32))
    return np.asarray(picture.resize((size, size), method)).clip(0, 65535)


def xrays(real_data: Path, count: int) -> list[np.ndarray]:
    """Real X-rays (1024, 1024) with 12 bits and a little noise."""
    images = []
    for path in sorted((real_data / "chestxray14" / "images").glob("*.png"))[:: 390 // count][:count]:
        gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert gray is not None
        noise = np.random.default_rng(len(images)).normal(8, 10, gray.shape)
        images.append(np.clip(gray * 16.0 + noise, 0, 4095).astype(np.uint16))
    return images


SIZES = [pytest.param(size, number, marks=pytest.mark.slow) for size, number in ((256, 1), (224, 1), (128, 2))]


@pytest.mark.parametrize("lossy", [False, True], ids=["lossless", "lossy"])  # of JPEG 2000
@pytest.mark.parametrize(("size", "number"), [(64, 3), *SIZES])
def test_reduced_xrays_differ_by_less_than_methods_of_resizing(
    size: int, number: int, lossy: bool, real_data: Path, halvings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences from averaging by area, in levels of 8 bits: bilinear and Lanczos are Pillow's, for shrinking.

    | size | reduced, lossless and lossy | not aligned  | bilinear | Lanczos |
    |------|-----------------------------|--------------|----------|---------|
    | 256  | 0.77, 0.49                  | 1.68, 1.54   | 1.06     | 0.88    |
    | 224  | 0.54, 0.52                  | 1.44, 1.42   | 0.96     | 0.90    |
    | 128  | 1.21, 0.64                  | 3.58, 3.21   | 1.38     | 1.23    |
    | 64   | 1.86, 0.94                  | 6.34, 5.58   | 2.09     | 1.71    |
    """
    ours, bilinear, lanczos, not_aligned = [], [], [], []
    for pixels in xrays(real_data, 6):
        data = jpeg_2000(pixels, lossy)
        whole = decode(data).pixels
        expected, _ = fit(whole, size)  # averages by area
        ours.append(rms(decode_to_fit(inspect(data), size).pixels, expected))
        bilinear.append(rms(resized(whole, size, Pillow.Resampling.BILINEAR), expected))
        lanczos.append(rms(resized(whole, size, Pillow.Resampling.LANCZOS), expected))
        with monkeypatch.context() as patch:
            patch.setattr(reduced, "_aligned", lambda pixels, *_: pixels)
            not_aligned.append(rms(decode_to_fit(inspect(data), size).pixels, expected))
    assert set(halvings) == {number}
    assert np.mean(ours) < max(np.mean(bilinear), np.mean(lanczos))
    assert np.mean(not_aligned) > max(np.mean(bilinear), np.mean(lanczos))


@pytest.mark.parametrize(("size", "number"), [(64, 3), *SIZES])
def test_reduced_jpegs_differ_by_less_than_methods_of_resizing(size: int, number: int, real_data: Path) -> None:
    """Differences from averaging by area: 0.2 to 0.5 levels, against 0.9 to 1.7 for Pillow's Lanczos."""
    ours, lanczos, reductions = [], [], []
    for pixels in xrays(real_data, 6):
        encoded = inspect(cv2.imencode(".jpg", pixels >> 4, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        whole = encoded.decode().pixels.astype(np.uint16) * 257

        def recorded(halvings: int, encoded: EncodedImage = encoded) -> Image | None:
            reductions.append(halvings)
            return encoded.decode_reduced(halvings)

        expected, _ = fit(whole, size)
        found = decode_to_fit(replace(encoded, decode_reduced=recorded), size).pixels.astype(float) * 257
        ours.append(rms(found, expected))
        lanczos.append(rms(resized(whole, size, Pillow.Resampling.LANCZOS), expected))
    assert set(reductions) == {number}
    assert np.mean(ours) < 0.6 * np.mean(lanczos)


@pytest.mark.parametrize("color", [False, True], ids=["gray", "color"])
@pytest.mark.parametrize("shape", [(1001, 777), (768, 1024)], ids=str)
def test_a_reduced_jpeg_lies_where_the_original_does(shape: tuple[int, int], color: bool) -> None:
    y, x = np.indices(shape)
    ramp = ((x + y) / (sum(shape) / 200) + 20).astype(np.uint8)
    picture = Pillow.fromarray(np.dstack([ramp] * 3) if color else ramp)
    orientation = Pillow.Exif()
    orientation[0x0112] = 6  # rotated, which is ignored
    data = encoded_picture(picture, "JPEG", quality=100, subsampling=0, exif=orientation)
    whole = inspect(data).decode().pixels
    assert whole.shape == shape
    found, (expected, _) = decode_to_fit(inspect(data), 128).pixels, fit(whole, 128)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1001, 777), (900, 1030), (1023, 640)], ids=str)
@pytest.mark.parametrize("size", [100, 128, 200])
def test_a_reduced_ramp_lies_where_the_original_does(shape: tuple[int, int], size: int, halvings: list[int]) -> None:
    """A shift by a tenth of a pixel of the result would change it by a tenth of the step between two pixels."""
    y, x = np.indices(shape)
    ramp = (200 + x + 2 * y).astype(np.uint16)
    expected, transform = fit(decode(jpeg_2000(ramp)).pixels, size)
    found = decode_to_fit(inspect(jpeg_2000(ramp)), size).pixels
    assert len(halvings) == 1
    step = 2 * transform.y_scale * 65535 / 4095
    inside = cv2.erode((expected > 0).astype(np.uint8), np.ones((3, 3))) > 0
    assert np.abs(found.astype(float) - expected)[inside].max() < step / 10
    assert_array_equal(found > 0, expected > 0)


def test_htj2k_is_reduced_too(halvings: list[int]) -> None:
    pixels = radiograph(12)
    data = dicom(dataset(pixels, **WINDOW), uid.HTJ2KLossless, bytes(htj2k_encode(pixels << 4, reversible=True)))
    assert decode_to_fit(inspect(data), 24).pixels.shape == (24, 24)
    assert not halvings, "16 bits are coded, 12 are stored"
    deep = radiograph(16)
    window = {"WindowCenter": "32768", "WindowWidth": "65536"}
    data = dicom(dataset(deep, **window), uid.HTJ2KLossless, bytes(htj2k_encode(deep, reversible=True)))
    found, (expected, _) = decode_to_fit(inspect(data), 24).pixels, fit(decode(data).pixels, 24)
    assert halvings == [1]
    assert rms(found, expected) < 3


def table() -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], np.arange(0, 65536, 16, np.uint16).tobytes()
    return item


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowWidth": "0"},
        {"VOILUTSequence": Items([table()])},
        {"ModalityLUTSequence": Items([table()])},
        {"PixelPaddingValue": 0},
        {"PixelRepresentation": 1},
        {"BitsStored": 10, "HighBit": 9},
        {"HighBit": 10, "BitsStored": 11},
    ],
    ids=lambda tags: next(iter(tags)),
)
def test_the_original_is_decoded_if_its_values_are_needed(tags: dict[str, Any], halvings: list[int]) -> None:
    data = jpeg_2000(radiograph(12), **tags)
    assert_array_equal(decode_to_fit(inspect(data), 20).pixels, fit(decode(data).pixels, 20)[0])
    assert not halvings


def test_the_original_is_decoded_if_a_window_shows_nothing(halvings: list[int]) -> None:
    data = jpeg_2000(radiograph(12), WindowCenter="-5000", WindowWidth="10")
    assert_array_equal(decode_to_fit(inspect(data), 20).pixels, fit(decode(data).pixels, 20)[0])
    assert halvings == [1]


@pytest.mark.parametrize(("size", "expected"), [(96, []), (25, []), (24, [1]), (13, [1]), (12, [2]), (6, [3])])
def test_the_reduced_image_has_at_least_twice_the_size(size: int, expected: list[int], halvings: list[int]) -> None:
    decode_to_fit(inspect(jpeg_2000(radiograph(12))), size)
    assert halvings == expected


def test_damage_is_reported_as_without_reduction(halvings: list[int]) -> None:
    data = bytearray(jpeg_2000(radiograph(12)))
    data[data.index(b"\xff\x52") + 9] = 40  # decomposition levels
    with pytest.raises(ImageRejectedError, match="OpenJPEG cannot decode the JPEG 2000 codestream"):
        decode_to_fit(inspect(bytes(data)), 20)
    assert halvings == [1]


def test_rows_in_several_formats_are_those_of_each_format(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(jpeg_2000(radiograph(12)))
    uris = pa.array([str(tmp_path / "a.dcm")])
    manifest = manifest_table({schema.IMAGE_ID: uris, schema.SOURCE_URI: uris})
    small, large = PixelFormat(16), PixelFormat(24, 16)
    formats = [ImageFormat(small), ImageFormat(large), ImageFormat(small, enhance=Enhancement(equalize="clahe"))]
    rows = make_rows_in_formats(manifest, formats)
    for number, stored in enumerate(formats):
        alone = make_rows(manifest, stored.pixels, enhance=stored.enhance)
        assert rows_in_format(rows, number, stored.pixels).equals(alone)


def test_rows_are_those_of_decode_to_fit(tmp_path: Path) -> None:
    pixels = radiograph(12)
    (tmp_path / "a.dcm").write_bytes(jpeg_2000(pixels))
    uris = pa.array([str(tmp_path / "a.dcm")])
    (row,) = make_rows(
        manifest_table({schema.IMAGE_ID: uris, schema.SOURCE_URI: uris}), PixelFormat(24, 16)
    ).to_pylist()
    assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == pixels.shape
    assert ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM]) == fit(pixels, 24)[1]
    expected = decode_to_fit(inspect(jpeg_2000(pixels)), 24).pixels
    assert_array_equal(np.frombuffer(row[schema.PIXELS], np.uint16).reshape(24, 24), expected)
