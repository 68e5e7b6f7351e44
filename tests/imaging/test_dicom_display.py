"""DICOM display: which LUT or window is used, and which are skipped as unusable."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, Sequence, dcmread, uid

from cxr.imaging.decode import decode
from tests.odd_files import dataset, dicom, radiograph

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")  # from writing invalid values

TWELVE = radiograph(12)  # 0 to 4095
WINDOW = {"WindowCenter": "2000", "WindowWidth": "1000"}


def shown(pixels: np.ndarray = TWELVE, syntax: uid.UID = uid.ExplicitVRLittleEndian, **tags: Any) -> np.ndarray:
    return decode(dicom(dataset(pixels, **{"BitsStored": 12, "HighBit": 11} | tags), syntax)).pixels


def lut(descriptor: list[int] | None, data: Any, vr: str = "OW") -> Dataset:
    item = Dataset()
    if descriptor is not None:
        item.add_new("LUTDescriptor", "US", descriptor)
    if data is not None:
        item.add_new("LUTData", vr, data)
    return item


def words(values: Any) -> bytes:
    return np.asarray(values).astype("<u2").tobytes()


SQUARES = np.arange(4096) ** 2 // 4096

UNUSABLE = {
    "no data": lut([4096, 0, 12], None),
    "empty data": lut([4096, 0, 12], b""),
    "constant data": lut([4096, 0, 12], words([700] * 4096)),
    "one entry": lut([1, 0, 12], words([700])),
    "one value for all pixels": lut([4, 5000, 12], words([1, 2, 3, 4])),
    "no descriptor": lut(None, words(SQUARES)),
    "two numbers in the descriptor": lut([4096, 0], words(SQUARES)),
    "empty item": Dataset(),
}


@pytest.mark.parametrize("item", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_voi_lut_falls_through_to_the_window(item: Dataset) -> None:
    np.testing.assert_array_equal(shown(VOILUTSequence=Sequence([item]), **WINDOW), shown(**WINDOW))


@pytest.mark.parametrize("item", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_voi_lut_without_a_window_falls_through_to_the_extremes(item: Dataset) -> None:
    useless = {"WindowCenter": ["0", "-9000"], "WindowWidth": ["0", "10"]}
    np.testing.assert_array_equal(shown(VOILUTSequence=Sequence([item]), **useless), shown())


@pytest.mark.parametrize("item", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_modality_lut_is_ignored(item: Dataset) -> None:
    rescale = {"RescaleSlope": "2", "RescaleIntercept": "-100", **WINDOW}
    expected = shown(**rescale)
    np.testing.assert_array_equal(shown(ModalityLUTSequence=Sequence([item]), **rescale), expected)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_the_first_usable_item_of_a_sequence_is_used(sequence: str) -> None:
    usable = lut([4096, 0, 12], words(SQUARES))
    both = Sequence([UNUSABLE["no data"], usable, lut([4096, 0, 12], words(np.arange(4096)))])
    np.testing.assert_array_equal(shown(**{sequence: both}), shown(**{sequence: Sequence([usable])}))


@pytest.mark.parametrize("rescale", [{"RescaleSlope": "1e300"}, {"RescaleSlope": "0"}, {"RescaleIntercept": "1e30"}])
def test_a_rescale_without_contrast_is_ignored(rescale: dict[str, str]) -> None:
    np.testing.assert_array_equal(shown(**rescale), shown())


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_entries_beyond_the_declared_number_are_not_used(sequence: str) -> None:
    declared = lut([1024, 0, 12], words(SQUARES[:1024]))
    longer = lut([1024, 0, 12], words([*SQUARES[:1024], *np.full(3072, 9)]))
    pixels = shown(**{sequence: Sequence([longer])})
    np.testing.assert_array_equal(pixels, shown(**{sequence: Sequence([declared])}))
    assert (pixels[TWELVE >= 1023] == 65535).all()


def test_a_table_with_fewer_entries_than_declared_ends_with_its_last_one() -> None:
    """The descriptor declares 4,096 entries of 12 bits, but the data are 4,096 bytes, i.e. 2,048 words."""
    pixels = shown(VOILUTSequence=Sequence([lut([4096, 0, 12], words(np.arange(2048)))]))
    np.testing.assert_allclose(pixels, np.minimum(TWELVE, 2047) / 2047 * 65535, atol=0.51)


BYTES = (np.arange(256) ** 2 // 256).astype(np.uint8)
OF_8_BITS = {
    "bytes": lut([256, 0, 8], BYTES.tobytes()),
    "bytes, as OB": lut([256, 0, 8], BYTES.tobytes(), "OB"),
    "bytes, two in each number of VR US": lut([256, 0, 8], np.frombuffer(BYTES.tobytes(), "<u2").tolist(), "US"),
    "bytes, more than declared": lut([256, 0, 8], BYTES.tobytes() + bytes(70)),
    "words": lut([256, 0, 8], words(BYTES)),
    "words of VR US": lut([256, 0, 8], BYTES.tolist(), "US"),
}


@pytest.mark.parametrize("item", OF_8_BITS.values(), ids=OF_8_BITS.keys())
@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian], ids=["explicit", "implicit"]
)
def test_entries_of_8_bits_are_bytes_or_words(item: Dataset, syntax: uid.UID) -> None:
    eight = radiograph(8)
    pixels = shown(eight, syntax, BitsStored=8, HighBit=7, VOILUTSequence=Sequence([item]))
    np.testing.assert_allclose(pixels, BYTES[eight] / int(BYTES.max()) * 255.0, atol=0.51)


@pytest.mark.parametrize(
    "item",
    [lut([256, 0, 8], BYTES.view("<u2").astype(">u2").tobytes()), lut([256, 0, 8], BYTES.astype(">u2").tobytes())],
    ids=["bytes", "words"],
)
def test_big_endian_tables_are_read_in_their_byte_order(item: Dataset) -> None:
    eight = radiograph(8).astype(">u2")
    pixels = shown(eight, uid.ExplicitVRBigEndian, BitsStored=8, HighBit=7, VOILUTSequence=Sequence([item]))
    np.testing.assert_allclose(pixels, BYTES[radiograph(8)] / int(BYTES.max()) * 255.0, atol=0.51)


@pytest.mark.parametrize("first", [-2000, 63536])
def test_the_first_mapped_value_of_signed_pixels_is_signed_for_any_vr(first: int) -> None:
    signed = TWELVE.astype(np.int16) - 2048
    item = lut([4096, 0, 12], words(SQUARES))
    del item.LUTDescriptor
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [4096, first, 12])
    pixels = shown(signed, VOILUTSequence=Sequence([item]))
    expected = SQUARES[np.clip(signed.astype(int) + 2000, 0, 4095)]
    np.testing.assert_allclose(pixels, expected / SQUARES.max() * 65535, atol=0.51)


def test_the_first_valid_window_is_used() -> None:
    several = {"WindowCenter": ["0", "1e400", "2000", "50"], "WindowWidth": ["0", "5", "1000", "10"]}
    np.testing.assert_array_equal(shown(**several), shown(**WINDOW))


def test_a_window_without_contrast_is_skipped() -> None:
    both = {"WindowCenter": ["-9000", "2000"], "WindowWidth": ["10", "1000"]}
    np.testing.assert_array_equal(shown(**both), shown(**WINDOW))


# ---- Code strings


@pytest.mark.parametrize("written", ["Sigmoid", " SIGMOID ", ["SIGMOID", "LINEAR"], "sigmoid"])
def test_voi_lut_function_is_trimmed_case_insensitive_and_the_first_of_several(written: str | list[str]) -> None:
    expected = 1 / (1 + np.exp(-4 * (TWELVE - 2000.0) / 1000))
    np.testing.assert_allclose(shown(VOILUTFunction=written, **WINDOW), expected * 65535, atol=0.51)


def test_an_unknown_voi_lut_function_is_linear() -> None:
    np.testing.assert_array_equal(shown(VOILUTFunction="CUBIC", **WINDOW), shown(**WINDOW))


@pytest.mark.parametrize("written", ["monochrome1", " Monochrome1", ["MONOCHROME1", "MONOCHROME2"]])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEGLSLossless], ids=["native", "JPEG-LS"])
def test_photometric_interpretation_is_trimmed_and_case_insensitive(
    written: str | list[str], syntax: uid.UID
) -> None:
    data = dicom(dataset(TWELVE, BitsStored=12, HighBit=11), syntax)
    file = dicom_with(data, "PhotometricInterpretation", written)
    np.testing.assert_array_equal(decode(file).pixels, 65535 - decode(data).pixels)


@pytest.mark.parametrize("written", ["inverse", " Inverse ", ["INVERSE", "IDENTITY"]])
def test_presentation_lut_shape_is_trimmed_and_case_insensitive(written: str | list[str]) -> None:
    np.testing.assert_array_equal(shown(PresentationLUTShape=written), 65535 - shown())


def dicom_with(data: bytes, keyword: str, given: Any) -> bytes:
    """The file with one tag replaced and unchanged pixel data."""
    file = dcmread(io.BytesIO(data))
    setattr(file, keyword, given)
    stream = io.BytesIO()
    file.save_as(stream)
    return stream.getvalue()
