"""Recognition of DICOM files, deflated files, and the codec's name in errors."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from imagecodecs import htj2k_encode
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import get_frame

from cxr.errors import ImageRejectedError
from cxr.imaging import image
from cxr.imaging.decode import check_head, decode
from tests.odd_files import dataset, dicom, lossless_jpeg, radiograph

TWELVE = radiograph(12)
DS = dataset(TWELVE, BitsStored=12, HighBit=11)
EXPECTED = decode(dicom(DS)).pixels


def bare(ds: Dataset, syntax: uid.UID) -> bytes:
    """Only the data set, without preamble and file meta information."""
    stream = io.BytesIO()
    ds.save_as(stream, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return stream.getvalue()


MAGIC_NUMBERS = [
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"%PDF-1.7",
    b"PK\3\4",
    b"BM",
]


@pytest.mark.parametrize("magic", MAGIC_NUMBERS)
def test_a_preamble_with_the_magic_number_of_another_format_is_a_dicom(magic: bytes) -> None:
    data = magic + dicom(DS)[len(magic) :]
    np.testing.assert_array_equal(decode(data).pixels, EXPECTED)
    check_head(data[:4096], len(data))


@pytest.mark.parametrize(
    "syntax",
    [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian],
    ids=lambda syntax: syntax.name,
)
@pytest.mark.parametrize(
    ("keyword", "given"),
    [
        ("SOPInstanceUID", "1.2.3"),
        ("AccessionNumber", ""),
        ("PatientName", "Doe^Jane"),
        ("PatientID", "0815"),
        ("BodyPartExamined", "CHEST"),
        ("StudyInstanceUID", "1.2.3.4"),
        ("SamplesPerPixel", 1),
    ],
)
def test_a_data_set_without_preamble_may_begin_with_any_low_tag(keyword: str, given: object, syntax: uid.UID) -> None:
    big = not syntax.is_little_endian
    ds = dataset(TWELVE.astype(">u2") if big else TWELVE, BitsStored=12, HighBit=11)
    del ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName
    setattr(ds, keyword, given)
    ds["PixelData"].VR = "OW"
    np.testing.assert_array_equal(decode(bare(ds, syntax)).pixels, EXPECTED)


@pytest.mark.parametrize(
    "data",
    [b"\x10\0\x20\0" + b"\xff" * 400, b"\x08\0\5\0", b"\x08\0\5\0\4\0\0\0abcd\x08\0\4\0" + bytes(60), bytes(400)],
)
def test_bytes_that_only_begin_like_a_tag_are_not_a_dicom(data: bytes) -> None:
    with pytest.raises(ImageRejectedError, match="unsupported file type"):
        decode(data)


# ---- Deflated


def deflated(ds: Dataset) -> tuple[bytes, bytes]:
    """A deflated file's preamble with its file meta information, and its compressed data set."""
    data = dicom(ds, uid.DeflatedExplicitVRLittleEndian)
    start = 132 + 12 + int.from_bytes(data[140:144], "little")
    return data[:start], data[start:]


def test_a_deflated_dicom_gives_the_same_pixels() -> None:
    np.testing.assert_array_equal(decode(b"".join(deflated(DS))).pixels, EXPECTED)


def test_a_deflated_dicom_that_ends_early_is_rejected_as_truncated() -> None:
    meta, body = deflated(DS)
    with pytest.raises(ImageRejectedError, match="truncated DICOM: the file ends inside the deflated data set"):
        decode(meta + body[:-100])


def test_a_deflated_dicom_that_cannot_be_inflated_is_rejected_as_damaged() -> None:
    meta, body = deflated(DS)
    with pytest.raises(ImageRejectedError, match="damaged DICOM: the deflated data set cannot be inflated"):
        decode(meta + b"\xff" * len(body))


def test_a_deflated_bomb_is_rejected_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.imaging.dicom.MAX_FILE_BYTES", 1 << 20)
    meta, _ = deflated(DS)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(bytes(image.MAX_FILE_BYTES)) + deflater.flush()
    with pytest.raises(ImageRejectedError, match="decompression bomb: expected at most 1 MiB"):
        decode(meta + bomb)


# ---- Codecs


def torn(syntax: uid.UID, codestream: bytes, pixels: np.ndarray) -> bytes:
    """A file whose codestream has a valid header and end, but random bytes between them."""
    middle = len(codestream) // 3
    nonsense = bytes(range(1, 120)) * (len(codestream) // 119 + 1)
    spoiled = codestream[:middle] + nonsense[: len(codestream) - middle - 2] + codestream[-2:]
    return dicom(dataset(pixels, BitsStored=12, HighBit=11), syntax, spoiled)


def codestream_of(syntax: uid.UID) -> bytes:
    return get_frame(dcmread(io.BytesIO(dicom(DS, syntax))).PixelData, 0, number_of_frames=1)


@pytest.mark.parametrize(
    ("syntax", "codestream", "reason"),
    [
        (uid.JPEGLSLossless, codestream_of(uid.JPEGLSLossless), "CharLS cannot decode the JPEG-LS codestream"),
        (uid.JPEGLosslessSV1, lossless_jpeg(TWELVE, 12), "the lossless JPEG decodes to more or fewer bits"),
        (uid.HTJ2KLossless, htj2k_encode(TWELVE, reversible=True), "OpenJPEG cannot decode the JPEG 2000 codestream"),
    ],
    ids=["JPEG-LS", "JPEG lossless", "HTJ2K"],
)
def test_damaged_coded_data_are_rejected(syntax: uid.UID, codestream: bytes, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        decode(torn(syntax, codestream, TWELVE))


def test_the_error_names_libjpeg_turbo() -> None:
    data = dicom(DS, uid.JPEGLosslessSV1, lossless_jpeg(TWELVE, 12).replace(b"\xff\xc4", b"\xff\xcc"))
    with pytest.raises(ImageRejectedError, match="libjpeg-turbo cannot decode the JPEG lossless codestream"):
        decode(data)


def test_the_error_names_openjpeg_too() -> None:
    data = bytearray(dicom(DS, uid.JPEG2000Lossless))
    data[data.index(b"\xff\x52") + 9] = 40  # decomposition levels
    with pytest.raises(ImageRejectedError, match="OpenJPEG cannot decode the JPEG 2000 codestream"):
        decode(bytes(data))
