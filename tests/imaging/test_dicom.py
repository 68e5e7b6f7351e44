"""DICOM: each step from stored values to brightness, checked against values computed by hand."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, Sequence, dcmread, uid

from cxr.imaging.decode import decode
from tests.odd_files import dataset, dicom, encoded, lossless_jpeg, radiograph

TWELVE = radiograph(12)  # 0 to 4095
AS_16_BITS = np.rint(TWELVE / 4095 * 65535).astype(np.uint16)


def display(pixels: np.ndarray, **tags: object) -> np.ndarray:
    return decode(dicom(dataset(pixels, **tags))).pixels


@pytest.mark.parametrize(
    "syntax",
    [uid.ImplicitVRLittleEndian, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless],
    ids=lambda syntax: syntax.name,
)
def test_lossless_syntaxes_give_the_same_pixels(syntax: uid.UID) -> None:
    data = dicom(dataset(TWELVE, BitsStored=12, HighBit=11), syntax)
    np.testing.assert_array_equal(decode(data).pixels, AS_16_BITS)


def test_jpeg_lossless_gives_the_same_pixels() -> None:
    ds = dataset(TWELVE, BitsStored=12, HighBit=11)
    for syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        np.testing.assert_array_equal(decode(dicom(ds, syntax, lossless_jpeg(TWELVE, 12))).pixels, AS_16_BITS)


def test_big_endian_gives_the_same_pixels() -> None:
    data = dicom(dataset(TWELVE.astype(">u2")), uid.ExplicitVRBigEndian)
    np.testing.assert_array_equal(decode(data).pixels, AS_16_BITS)


def test_jpeg_baseline_is_close_to_its_source() -> None:
    gray = radiograph()
    pixels = decode(dicom(dataset(gray), uid.JPEGBaseline8Bit, encoded(gray, "JPEG"))).pixels
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - gray).mean() < 6


def test_monochrome1_is_inverted() -> None:
    turned = display(TWELVE, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(turned, 65535 - AS_16_BITS)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_inverse_presentation_inverts_once(photometric: str) -> None:
    turned = display(TWELVE, PhotometricInterpretation=photometric, PresentationLUTShape="INVERSE")
    np.testing.assert_array_equal(turned, 65535 - AS_16_BITS)


def test_signed_values_and_rescale() -> None:
    signed = TWELVE.astype(np.int16) - 2048
    np.testing.assert_array_equal(display(signed), AS_16_BITS)
    window = {"RescaleSlope": "2", "RescaleIntercept": "4096", "WindowCenter": "4096", "WindowWidth": "4096"}
    pixels = display(signed, VOILUTFunction="LINEAR_EXACT", **window)
    expected_unit = np.clip((signed * 2.0 + 4096 - 4096) / 4096 + 0.5, 0, 1)
    np.testing.assert_allclose(pixels, expected_unit * 65535, atol=0.51)


def test_bits_above_the_stored_bits_are_ignored() -> None:
    overlaid = TWELVE | (np.indices(TWELVE.shape).sum(0) % 2 << 15).astype(np.uint16)
    np.testing.assert_array_equal(display(overlaid, BitsStored=12, HighBit=11), AS_16_BITS)


@pytest.mark.parametrize(
    ("function", "unit"),
    [
        ("LINEAR", lambda x: np.clip((x - 1999.5) / 999 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 2000) / 1000 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 2000) / 1000))),
    ],
)
def test_window_functions(function: str, unit) -> None:
    pixels = display(TWELVE, WindowCenter="2000", WindowWidth="1000", VOILUTFunction=function)
    np.testing.assert_allclose(pixels, unit(TWELVE.astype(float)) * 65535, atol=0.51)


def test_the_first_of_several_windows_is_used() -> None:
    both = display(TWELVE, WindowCenter=["2000", "50"], WindowWidth=["1000", "10"])
    np.testing.assert_array_equal(both, display(TWELVE, WindowCenter="2000", WindowWidth="1000"))


@pytest.mark.parametrize(("center", "width"), [("0", "0"), ("2000", "-5"), ("-9000", "10")])
def test_windows_without_contrast_are_skipped(center: str, width: str) -> None:
    np.testing.assert_array_equal(display(TWELVE, WindowCenter=center, WindowWidth=width), AS_16_BITS)


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
def test_lookup_tables(sequence: str) -> None:
    table = np.sqrt(np.arange(4000) / 3999) * 1023
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4000, 50, 10], table.astype(np.uint16).tobytes()
    pixels = display(TWELVE, **{sequence: Sequence([item])})
    looked_up = table.astype(np.uint16)[np.clip(TWELVE.astype(int) - 50, 0, 3999)]
    np.testing.assert_allclose(pixels, looked_up / 1023 * 65535, atol=0.51)


def test_lookup_table_of_packed_bytes() -> None:
    eight = radiograph(8)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 8], np.arange(256)[::-1].astype(np.uint8).tobytes()
    pixels = display(eight, VOILUTSequence=Sequence([item])).astype(float)
    np.testing.assert_allclose(pixels / np.iinfo(display(eight).dtype).max, 1 - eight / 255, atol=0.01)


def test_padding_is_black_and_excluded_from_the_range() -> None:
    padded = TWELVE.copy()
    padded[:10] = 60000
    rest = display(TWELVE[10:])
    for photometric, expected in (("MONOCHROME2", rest), ("MONOCHROME1", 65535 - rest)):
        pixels = display(padded, PixelPaddingValue=60000, PhotometricInterpretation=photometric)
        assert not pixels[:10].any()
        np.testing.assert_allclose(pixels[10:], expected, atol=1)


@pytest.mark.parametrize(
    ("tags", "spacing_mm", "view"),
    [
        ({"PixelSpacing": ["0.14", "0.15"], "ViewPosition": "PA"}, (0.14, 0.15), "PA"),
        ({"ImagerPixelSpacing": ["0.2", "0.2"], "ViewPosition": "AP"}, (0.2, 0.2), "AP"),
        ({"PixelSpacing": ["0", "0"], "ViewPosition": "MS DOE"}, None, None),
        ({}, None, None),
    ],
)
def test_spacing_and_view(tags: dict, spacing_mm: tuple | None, view: str | None) -> None:
    image = decode(dicom(dataset(TWELVE, **tags)))
    assert (image.spacing_mm, image.view) == (spacing_mm, view)


def test_eight_stored_bits_give_eight_bits() -> None:
    gray = radiograph()
    np.testing.assert_array_equal(display(gray), gray)


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    data = dicom(dataset(TWELVE, WindowCenter="2000", WindowWidth="1000"))
    odd = data.replace(b"2000", b"2o0o")  # pydicom's warning would quote the value
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(odd).pixels, AS_16_BITS)
    assert not caplog.records


def test_real_dicom_and_its_monochrome1_twin(real_data: Path) -> None:
    """The twin differs only in its tag: the same stored values marked MONOCHROME1 give the negative.

    The standard says so (PS3.3 C.7.6.3.1.2): the smallest value is white. A twin that looks the same has inverted
    values as well, as in the test below. Only the shade between 127 and 128 is rounded to 128 in both.
    """
    folder = real_data / "siim" / "dicom"
    twin = decode((folder / "Fake_MONOHR1.dcm").read_bytes())
    (real,) = [decode(p.read_bytes()) for p in folder.glob("*.dcm") if p.name != "Fake_MONOHR1.dcm"]
    assert (real.pixels.shape, real.pixels.dtype) == ((1024, 1024), np.uint8)
    assert (real.spacing_mm, real.view) == ((0.168, 0.168), "PA")
    halfway = real.pixels == 128
    np.testing.assert_array_equal(twin.pixels[~halfway], 255 - real.pixels[~halfway])
    assert set(np.unique(twin.pixels[halfway])) == {128}


def test_real_dicom_written_as_monochrome1_looks_the_same(real_data: Path, tmp_path: Path) -> None:
    """A correct MONOCHROME1 twin, with inverted values and the tag, decodes to equal pixels."""
    (path,) = [p for p in (real_data / "siim" / "dicom").glob("*.dcm") if p.name != "Fake_MONOHR1.dcm"]
    file = dcmread(path)
    file.decompress(decoding_plugin="pillow")  # the same decoder as ours; others differ by one level
    file.PixelData = (255 - file.pixel_array).tobytes()
    file.PhotometricInterpretation = "MONOCHROME1"
    file.save_as(tmp_path / "twin.dcm")
    twin, real = decode((tmp_path / "twin.dcm").read_bytes()), decode(path.read_bytes())
    np.testing.assert_array_equal(twin.pixels, real.pixels)


@pytest.mark.parametrize(
    ("tags", "sex", "age_years"),
    [
        ({"PatientSex": "F", "PatientAge": "045Y"}, "F", 45.0),
        ({"PatientSex": "m ", "PatientAge": "006M"}, "M", 0.5),
        ({"PatientSex": "O", "PatientBirthDate": "19700615", "StudyDate": "20200614"}, "O", 49.0),
        ({"PatientBirthDate": "1970.06.15", "StudyDate": "20200616"}, None, 50.0),
        ({"PatientSex": "female", "PatientAge": "old"}, None, None),
        ({"PatientAge": "999Y"}, None, None),
        ({"PatientBirthDate": "20200101", "StudyDate": "19700101"}, None, None),
        ({}, None, None),
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom warns about the invalid values that this test writes
def test_sex_and_age(tags: dict, sex: str | None, age_years: float | None) -> None:
    image = decode(dicom(dataset(radiograph(), **tags)))
    assert (image.sex, image.age_years) == (sex, age_years)


def test_study_and_series() -> None:
    image = decode(dicom(dataset(radiograph(), StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.4")))
    assert (image.study_id, image.series_id) == ("1.2.3", "1.2.3.4")
