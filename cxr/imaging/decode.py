"""Decode a file's bytes into one X-ray, or say why it is rejected; the content decides the type."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cxr.errors import ImageRejectedError
from cxr.imaging import dicom_signature, png_jpeg
from cxr.imaging.image import EncodedImage, Image, check_file_bytes, check_not_blank, require_memory, to_bits

__all__ = ["EncodedImage", "Image", "check_head", "decode", "inspect", "to_bits"]

_UNSUPPORTED = (  # (offset, magic bytes, name)
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (8, b"WEBP", "WebP"),
    (4, b"ftyp", "HEIC, AVIF or video"),
    (0, b"\0\0\0\x0cjP  ", "bare JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "bare JPEG 2000"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\3\4", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip archive"),
    (0, b"7z\xbc\xaf", "7z archive"),
    (0, b"SQLite", "database"),
    (0, b"BM", "BMP"),
)


def decode(data: bytes) -> Image:
    """Decode PNG (1–16 bits, gray, RGB, RGBA, palette), JPEG, DICOM (see `dicom.inspect_dicom`) or raw JSRT.

    Raises:
        ImageRejectedError: the file does not contain a usable X-ray; the message is the reason, without patient data.
        MemoryError: there is not enough memory at the moment.
    """
    return inspect(data).decode()


def inspect(data: bytes) -> EncodedImage:
    """Check everything in a file's header without decoding its pixels: the first step of `decode`.

    Raises:
        ImageRejectedError: as for `decode`; the returned image's `decode` may still raise it.
    """
    if not data:
        raise ImageRejectedError("empty file: 0 bytes")
    check_file_bytes(len(data))
    if dicom_signature.has_preamble(data):  # checked first: a preamble may begin with another format's magic number
        encoded = _inspect_dicom(data)
    elif data.startswith(png_jpeg.PNG_MAGIC):
        encoded = png_jpeg.inspect_png(data)
    elif data.startswith(png_jpeg.JPEG_MAGIC):
        encoded = png_jpeg.inspect_jpeg(data)
    elif png_jpeg.is_jsrt(data):
        encoded = png_jpeg.inspect_jsrt(data)
    elif dicom_signature.begins_like_data_set(data):
        encoded = _inspect_dicom(data)
    else:
        raise ImageRejectedError(f"unsupported file type: {_unsupported_type(data)}; expected DICOM, PNG or JPEG")
    return replace(encoded, decode=partial(_decode, encoded), decode_reduced=partial(_decode_reduced, encoded))


def _inspect_dicom(data: bytes) -> EncodedImage:
    from cxr.imaging.dicom import inspect_dicom  # pydicom is slow to import

    return inspect_dicom(data)


def check_head(head: bytes, file_bytes: int) -> None:
    """Reject a file by its first bytes and its size, before the rest is read.

    Args:
        head: at least the first 512 bytes, or all of a smaller file.
        file_bytes: size of the whole file.
    """
    if not file_bytes:
        raise ImageRejectedError("empty file: 0 bytes")
    supported = dicom_signature.has_preamble(head) or head.startswith(
        (png_jpeg.PNG_MAGIC, png_jpeg.JPEG_MAGIC, png_jpeg.GIF_MAGIC)
    )
    if not (supported or file_bytes == png_jpeg.JSRT_BYTES or dicom_signature.begins_like_data_set(head)):
        raise ImageRejectedError(f"unsupported file type: {_unsupported_type(head)}; expected DICOM, PNG or JPEG")
    check_file_bytes(file_bytes)


def _decode(encoded: EncodedImage) -> Image:
    require_memory(encoded.memory_bytes)
    image = encoded.decode()
    if image.pixels.shape != (encoded.height, encoded.width):
        raise ImageRejectedError("damaged image: the pixels contradict the size in the header")
    check_not_blank(image.pixels)
    return image


def _decode_reduced(encoded: EncodedImage, halvings: int) -> Image | None:
    require_memory(encoded.memory_bytes)  # codecs hold all coefficients or code blocks, whatever they decode
    image = encoded.decode_reduced(halvings)
    expected = ((encoded.height - 1 >> halvings) + 1, (encoded.width - 1 >> halvings) + 1)
    if image is None or image.pixels.shape != expected:
        return None
    check_not_blank(image.pixels)
    return image


def _unsupported_type(data: bytes) -> str:
    for offset, magic, name in _UNSUPPORTED:
        if data.startswith(magic, offset):
            return name
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    if not any(data[:512]):
        return "only zero bytes"
    text = "".join(data[:512].decode("utf-8", "replace").rstrip("\ufffd").split())
    return "text" if text.isprintable() and "\ufffd" not in text else "unknown"
