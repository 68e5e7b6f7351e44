"""Any file's bytes to one X-ray, or the reason why not. Its content decides its type, never its name."""

from __future__ import annotations

from cxr.errors import Refused
from cxr.imaging import dicom, raster
from cxr.imaging.image import Image, check_not_blank, to_bits

__all__ = ["Image", "decode", "to_bits"]

_FOREIGN = (  # (offset, magic bytes, name)
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
    """Decode PNG (1–16 bits, gray, RGB, RGBA, palette), JPEG, DICOM (see `dicom.decode_dicom`) or raw JSRT.

    Raises:
        Refused: no X-ray can be had from it; the message is the reason, and holds nothing of the patient.
    """
    if not data:
        raise Refused("empty file: 0 bytes")
    if data.startswith(raster.PNG_MAGIC):
        image = Image(raster.decode_png(data))
    elif data.startswith(raster.JPEG_MAGIC):
        image = Image(raster.decode_jpeg(data))
    elif raster.is_jsrt(data):
        image = Image(raster.decode_jsrt(data))
    elif dicom.is_dicom(data):
        image = dicom.decode_dicom(data)
    else:
        raise Refused(f"unsupported file type: {_foreign_type(data)}; wanted DICOM, PNG or JPEG")
    check_not_blank(image.pixels)
    return image


def _foreign_type(data: bytes) -> str:
    for offset, magic, name in _FOREIGN:
        if data.startswith(magic, offset):
            return name
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    if not any(data[:512]):
        return "only zero bytes"
    text = "".join(data[:512].decode("utf-8", "replace").rstrip("\ufffd").split())
    return "text" if text.isprintable() and "\ufffd" not in text else "unknown"
