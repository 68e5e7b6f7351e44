"""Limits that are checked before decoding; and running out of memory must never be reported as a damaged file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import jpeg_ls
import numpy as np
import pytest
from pydicom import uid

from cxr.errors import ImageRejectedError
from cxr.imaging import decode as decoding
from cxr.imaging import dicom, dicom_codestream, image, png_jpeg
from cxr.imaging.decode import check_head, decode, inspect
from tests.odd_files import HEIGHT, WIDTH, chunk, dataset, encoded, radiograph, run_lengths
from tests.odd_files import dicom as dicom_file

SIDE = 10_000


def png(color: int, bits: int, side: int = SIDE) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def resized(data: bytes, side: int = SIDE, big_endian: bool = True) -> bytes:
    """Replace every 96 x 80 in the data, height or width first, by side x side."""
    order, size = ">" if big_endian else "<", (HEIGHT, WIDTH)
    for kind in "HI":
        for old in (size, size[::-1]):
            data = data.replace(struct.pack(f"{order}2{kind}", *old), struct.pack(f"{order}2{kind}", side, side))
    return data


def compressed_dicom(syntax: uid.UID, codestream: bytes, side: int) -> bytes:
    return dicom_file(dataset(radiograph(), Rows=side, Columns=side), syntax, codestream)


@pytest.fixture
def _no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pixel decoder fail."""
    for module, name in (
        (png_jpeg.cv2, "imdecode"),
        (png_jpeg.rust, "decode_image_png_u8"),
        (dicom, "apply_display_pipeline"),
    ):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(dicom_codestream, "_CODECS", {})


@pytest.mark.usefixtures("_no_decoder")
@pytest.mark.parametrize(("color", "bits"), [(6, 16), (2, 16), (4, 16)], ids=["RGBA", "RGB", "gray and alpha"])
def test_a_png_that_needs_too_much_memory_is_rejected_by_its_header(color: int, bits: int) -> None:
    with pytest.raises(
        ImageRejectedError, match="too large: expected an image that needs at most 768 MiB to decode, got 1,"
    ):
        decode(png(color, bits))


@pytest.mark.usefixtures("_no_decoder")
def test_a_png_with_too_few_bytes_for_deflate_is_rejected_by_its_header() -> None:
    with pytest.raises(ImageRejectedError, match="damaged PNG: too few compressed bytes"):
        decode(png(0, 8))


GRAY = radiograph()
BOMBS = {
    "JPEG-LS": (uid.JPEGLSLossless, bytes(jpeg_ls.encode_array(GRAY)), "decompression bomb"),
    "JPEG 2000": (uid.JPEG2000Lossless, encoded(GRAY, "JPEG2000", no_jp2=True, num_resolutions=2), "bomb"),
    "JPEG": (uid.JPEGBaseline8Bit, encoded(GRAY, "JPEG"), "decompression bomb"),
    "RLE": (uid.RLELossless, run_lengths(GRAY), "RLE data are shorter than"),
}


@pytest.mark.usefixtures("_no_decoder")
@pytest.mark.parametrize(("syntax", "codestream", "reason"), BOMBS.values(), ids=BOMBS.keys())
def test_a_small_dicom_that_declares_many_pixels_is_rejected(syntax: uid.UID, codestream: bytes, reason: str) -> None:
    side = 9_000
    with pytest.raises(ImageRejectedError, match=reason):
        decode(compressed_dicom(syntax, resized(codestream, side), side))


@pytest.mark.usefixtures("_no_decoder")
def test_a_small_jpeg_that_declares_many_pixels_is_rejected() -> None:
    with pytest.raises(
        ImageRejectedError, match="decompression bomb: expected at most 1,000 pixels per encoded byte"
    ):
        decode(resized(encoded(GRAY, "JPEG")))


@pytest.mark.usefixtures("_no_decoder")
def test_a_jpeg_with_a_thousand_scans_is_rejected() -> None:
    data = encoded(GRAY, "JPEG", progressive=True)
    data = data[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 1000 + data[-2:]
    for file in (data, dicom_file(dataset(GRAY), uid.JPEGBaseline8Bit, data)):
        with pytest.raises(ImageRejectedError, match="expected at most 100 scans, got 10"):
            decode(file)


def test_a_header_with_too_many_elements_is_rejected() -> None:
    whole = dicom_file(dataset(GRAY))
    start = whole.index(b"\x28\0\x02\0US")
    private = b"".join(struct.pack("<HH2sH", 0x0019, 0x1000 + number, b"LO", 0) for number in range(20_000))
    with pytest.raises(ImageRejectedError, match="expected at most 10,000 elements"):
        decode(whole[:start] + private + whole[start:])


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless], ids=lambda syntax: syntax.name)
def test_an_almost_blank_film_is_not_a_bomb(syntax: uid.UID) -> None:
    film = np.zeros((4000, 3000), np.uint8)
    film[10:20, 10:20] = 255
    data = dicom_file(dataset(film), syntax)
    assert film.size > 1000 * len(data)
    np.testing.assert_array_equal(decode(data).pixels, film)


def test_an_almost_blank_mask_is_not_a_bomb() -> None:
    mask = np.zeros((5000, 4000), np.uint8)
    mask[:2500, :2000] = 255
    np.testing.assert_array_equal(png_jpeg.decode_mask(encoded(mask)), mask)


@pytest.mark.parametrize(
    ("head", "file_bytes", "reason"),
    [
        (b"", 0, "empty file"),
        (b"\0\0\0\x18ftypmp42" + bytes(500), 3 << 30, "unsupported file type: HEIC, AVIF or video"),
        (encoded(GRAY)[:4096], 3 << 30, "too large: expected a file of at most 256 MiB, got 3,072 MiB"),
        (dicom_file(dataset(GRAY))[:4096], 257 << 20, "too large: expected a file of at most 256 MiB, got 257 MiB"),
    ],
)
def test_a_file_is_rejected_by_its_first_bytes_and_its_size(head: bytes, file_bytes: int, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason):
        check_head(head, file_bytes)


def test_the_file_size_limit_allows_the_largest_uncompressed_image() -> None:
    assert 2 * image.MAX_PIXELS < image.MAX_FILE_BYTES


# ---- Out of memory

KINDS = {
    "PNG": (encoded(GRAY), "cxr.imaging.png_jpeg.rust.decode_image_png_u8"),
    "RGB PNG": (encoded(np.dstack([GRAY] * 3)), "cxr.imaging.png_jpeg.cv2.imdecode"),
    "JPEG": (encoded(GRAY, "JPEG"), "cxr.imaging.png_jpeg.cv2.imdecode"),
    "DICOM, parsing": (dicom_file(dataset(GRAY)), "cxr.imaging.dicom.read_partial"),
    "DICOM, a tag": (dicom_file(dataset(GRAY)), "pydicom.Dataset.get"),
    "DICOM, display": (dicom_file(dataset(GRAY)), "cxr.imaging.dicom.apply_display_pipeline"),
}


def out_of_memory(*arguments: object, **options: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(("data", "place"), KINDS.values(), ids=KINDS.keys())
def test_running_out_of_memory_stays_a_memory_error(data: bytes, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, out_of_memory)
    with pytest.raises(MemoryError):
        decode(data)


@pytest.mark.parametrize("name", ["JPEG", "JPEG-LS", "JPEG 2000"])
def test_running_out_of_memory_in_a_dicom_codec_stays_a_memory_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    syntax, codestream, _ = BOMBS[name]
    monkeypatch.setitem(dicom_codestream._CODECS, name, ("codec", out_of_memory))
    with pytest.raises(MemoryError):
        decode(dicom_file(dataset(GRAY), syntax, codestream))


@pytest.mark.parametrize("read", [decode, png_jpeg.decode_mask], ids=["image", "mask"])
def test_memory_is_checked_before_a_codec_starts(
    read: Callable[[bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codecs that run out of memory abort the process or report a damaged file."""
    for module in (decoding, png_jpeg):
        monkeypatch.setattr(module, "require_memory", out_of_memory)
    monkeypatch.setattr(png_jpeg, "_decode_gray", None)
    with pytest.raises(MemoryError):
        read(encoded(GRAY))


def test_reduced_decoding_requires_the_memory_that_codecs_take_at_any_resolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Progressive JPEGs have all their coefficients in memory, and JPEG 2000 all its code blocks."""
    required: list[int] = []
    monkeypatch.setattr(decoding, "require_memory", required.append)
    image = inspect(encoded(radiograph(), "JPEG", progressive=True))
    image.decode_reduced(2)
    assert required == [image.memory_bytes]


def test_inspect_returns_the_memory_and_decodes_nothing() -> None:
    encoded_image = inspect(dicom_file(dataset(GRAY), uid.JPEG2000Lossless))
    assert encoded_image.memory_bytes >= 8 * GRAY.size
    np.testing.assert_array_equal(encoded_image.decode().pixels, GRAY)
