"""From the bits of DICOM samples to stored values: High Bit, Bits Stored, sign and padding."""

from __future__ import annotations

import sys
from typing import Any

import jpeg_ls
import numpy as np
import pytest
from pydicom import uid

from cxr.errors import ImageRejectedError
from cxr.imaging.decode import decode
from tests.odd_files import dataset, dicom, radiograph, run_lengths

NATIVE_AND_RLE = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.RLELossless)


def shown(samples: np.ndarray, syntax: uid.UID = uid.ExplicitVRLittleEndian, **tags: Any) -> np.ndarray:
    codestream = run_lengths(samples) if syntax == uid.RLELossless else b""
    return decode(dicom(dataset(samples, **tags), syntax, codestream)).pixels


def laid_out(values: np.ndarray, allocated: int, stored: int, high: int, others: bool) -> np.ndarray:
    """Samples with the values in bits `high` to `high` + 1 − `stored`, optionally with noise in all other bits."""
    low, mask = high + 1 - stored, (1 << stored) - 1
    samples = (values.astype(np.int64) & mask) << low
    if others:
        noise = np.random.default_rng(1).integers(0, 1 << allocated, values.shape)
        samples |= noise & ~(mask << low)
    return samples.astype(np.uint8 if allocated == 8 else np.uint16)


@pytest.mark.parametrize("syntax", NATIVE_AND_RLE, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("allocated", "stored", "high"),
    [
        (16, 12, 15),
        (16, 12, 13),
        (16, 12, 11),
        (16, 10, 15),
        (16, 8, 15),
        (16, 1, 9),
        (8, 6, 7),
        (8, 5, 5),
        (8, 8, 7),
    ],
)
def test_high_bit_locates_the_stored_value_among_other_bits(
    allocated: int, stored: int, high: int, signed: bool, syntax: uid.UID
) -> None:
    values = radiograph(stored).astype(np.int64) - (1 << (stored - 1) if signed else 0)
    tags = {"BitsStored": stored, "PixelRepresentation": int(signed)}
    plain = laid_out(values, allocated, stored, stored - 1, others=False)
    expected = shown(plain, HighBit=stored - 1, **tags)
    np.testing.assert_allclose(
        expected / np.iinfo(expected.dtype).max, radiograph(stored) / (2**stored - 1), atol=0.003
    )
    for others in (False, True):
        samples = laid_out(values, allocated, stored, high, others)
        np.testing.assert_array_equal(shown(samples, syntax, HighBit=high, **tags), expected)


def test_left_aligned_samples_of_a_jpeg_ls_codestream_are_shifted() -> None:
    twelve = radiograph(12)
    expected = shown(twelve, BitsStored=12, HighBit=11)
    codestream = bytes(jpeg_ls.encode_array(twelve << 4))
    data = dicom(dataset(twelve, BitsStored=12, HighBit=15), uid.JPEGLSLossless, codestream)
    np.testing.assert_array_equal(decode(data).pixels, expected)


def test_codec_samples_with_fewer_bits_begin_at_bit_0() -> None:
    """A 12-bit codestream whose data set still has the bit attributes of the uncompressed image."""
    data = dicom(dataset(radiograph(12), BitsStored=12, HighBit=11), uid.JPEGLSLossless)
    expected = decode(data).pixels
    element = b"\x28\0\x02\1US\2\0"
    np.testing.assert_array_equal(decode(data.replace(element + b"\x0b\0", element + b"\x0f\0")).pixels, expected)


def test_without_its_codec_a_file_is_rejected_and_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(dataset(radiograph(12), BitsStored=12, HighBit=11), uid.JPEGLSLossless)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(
        ImageRejectedError, match=r"JPEG-LS needs a codec that is not installed: run pip install 'cxr\[dicom\]'"
    ):
        decode(data)


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless], ids=lambda syntax: syntax.name)
def test_signed_codec_values_keep_their_sign(syntax: uid.UID) -> None:
    signed = radiograph(12).astype(np.int16) - 2048
    tags = {"BitsStored": 12, "HighBit": 11}
    np.testing.assert_array_equal(shown(signed, syntax, **tags), shown(signed, **tags))


# ---- Padding


def bordered(values: np.ndarray, padding: int, width: int = 10) -> np.ndarray:
    padded = np.pad(values, width, constant_values=padding)
    return padded.astype(values.dtype)


PADDINGS = [  # allocated, stored, signed, padding as a sample, as written, its VR
    (16, 16, False, 65535, 65535, "US"),
    (16, 16, False, 65535, -1, "SS"),
    (16, 16, True, -2000, -2000, "SS"),
    (16, 16, True, -2000, 63536, "US"),
    (16, 12, False, 4095, 65535, "US"),
    (16, 12, False, 4095, -1, "SS"),
    (16, 12, True, -2048, -2048, "SS"),
    (16, 12, True, -2048, 0x0800, "US"),
    (16, 12, True, -2048, 0xF800, "US"),
    (8, 8, False, 255, -1, "SS"),
    (8, 8, True, -128, 128, "US"),
    (8, 8, True, -128, 0xFF80, "US"),
]


@pytest.mark.parametrize(("allocated", "stored", "signed", "padding", "written", "vr"), PADDINGS)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless], ids=["native", "RLE"])
def test_padding_is_black_and_does_not_change_the_rest(
    allocated: int, stored: int, signed: bool, padding: int, written: int, vr: str, syntax: uid.UID
) -> None:
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    values = (radiograph(stored) // 2).astype(kind)
    tags = {"BitsStored": stored, "HighBit": stored - 1}
    ds = dataset(bordered(values, padding), **tags)
    ds.add_new("PixelPaddingValue", vr, written)
    pixels = decode(dicom(ds, syntax)).pixels
    assert not pixels[:10].any()
    assert not pixels[:, -10:].any()
    np.testing.assert_array_equal(pixels[10:-10, 10:-10], shown(values, **tags))


@pytest.mark.parametrize(("vr", "first", "last"), [("SS", -2000, -1900), ("US", 63536, 63636), ("US", 63636, 63536)])
def test_the_padding_range_is_in_stored_values(vr: str, first: int, last: int) -> None:
    values = radiograph(12).astype(np.int16)
    padded = bordered(values, -2000)
    padded[:5] = -1900
    ds = dataset(padded)
    ds.add_new("PixelPaddingValue", vr, first)
    ds.add_new("PixelPaddingRangeLimit", vr, last)
    pixels = decode(dicom(ds)).pixels
    assert not pixels[:10].any()
    np.testing.assert_array_equal(pixels[10:-10, 10:-10], shown(values))


@pytest.mark.parametrize("written", [0xFFF, 0xFFF0], ids=["stored value", "as the samples"])
def test_padding_of_left_aligned_samples_may_be_a_stored_value_or_a_sample(written: int) -> None:
    values = radiograph(12) // 2
    ds = dataset(bordered(values << 4, 0xFFF0), BitsStored=12, HighBit=15)
    ds.add_new("PixelPaddingValue", "US", written)
    pixels = decode(dicom(ds)).pixels
    assert not pixels[:10].any()
    np.testing.assert_array_equal(pixels[10:-10, 10:-10], shown(values, BitsStored=12, HighBit=11))


# ---- Run-length encoding


def test_rle_with_the_wrong_number_of_segments_is_rejected() -> None:
    data = dicom(dataset(radiograph(12)), uid.RLELossless)
    start = data.index(b"\2\0\0\0\x40\0\0\0")
    with pytest.raises(ImageRejectedError, match="expected 2 RLE segments, got 3"):
        decode(data[:start] + b"\3" + data[start + 1 :])


def test_rle_that_ends_early_is_rejected_as_truncated() -> None:
    tall = dataset(radiograph(12))
    data = dicom(tall, uid.RLELossless)
    rows = b"\x28\0\x10\0US\2\0"
    with pytest.raises(ImageRejectedError, match="truncated"):
        decode(data.replace(rows + b"\x60\0", rows + b"\xff\0"))
