"""PNG, JPEG, GIF and raw JSRT pictures to gray pixels. Headers come first: bombs and torn files are not decoded.

An EXIF orientation is ignored: annotations count pixels as they are stored. Damage inside a JPEG's coded data
that leaves its markers whole cannot be noticed: the format has no checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import cv2
import numpy as np
from kornia_rs import io as rust  # pyright: ignore[reportMissingModuleSource]
from PIL import Image as Pillow

from cxr.errors import Refused
from cxr.imaging.image import check_size, to_gray

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
GIF_MAGIC = b"GIF8"

_PNG_GRAY = 0  # colour type

JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # the last is JPEG-LS
_JPEG_DECODABLE = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive

_JSRT_SIDE_PX, _JSRT_BLACK = 2048, 4095


def decode_picture(data: bytes) -> np.ndarray:
    """The pixels (H, W), uint8 or uint16, of a PNG, GIF or JPEG.

    Raises:
        Refused: it is none of them, or cannot be used.
    """
    if data.startswith(PNG_MAGIC):
        return decode_png(data)
    return decode_gif(data) if data.startswith(GIF_MAGIC) else decode_jpeg(data)


def decode_png(data: bytes) -> np.ndarray:
    """A PNG's pixels (H, W), uint8 or uint16.

    Raises:
        Refused: torn, damaged, animated, coloured or of a refused size.
    """
    chunks = _png_chunks(data)
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise Refused("damaged PNG: it does not begin with its header")
    width, height, bits, colour = struct.unpack(">IIBB", header[:10])
    check_size(height, width)
    if any(kind == b"acTL" for kind, _ in chunks):
        raise Refused("multi-frame image: an animated PNG")
    fast = _decode_gray(data, height, width, bits) if colour == _PNG_GRAY and bits in (8, 16) else None
    return _full_range(_decode(data, "PNG") if fast is None else fast)


def _decode_gray(data: bytes, height: int, width: int, bits: int) -> np.ndarray | None:
    """The pixels of a plain gray PNG in half of OpenCV's time, or None where OpenCV shall say what is wrong."""
    read = rust.decode_image_png_u8 if bits == 8 else rust.decode_image_png_u16
    try:
        return read(data, (height, width), "mono")[..., 0]
    except Exception:  # the decoder raises nothing more special
        return None


def _full_range(pixels: np.ndarray) -> np.ndarray:
    """16-bit samples of which only lower bits are used, as in exports of 10–14-bit X-rays, shifted to the top."""
    if pixels.dtype != np.uint16:
        return pixels
    return pixels << (16 - max(8, int(pixels.max(initial=0)).bit_length()))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(PNG_MAGIC)
    while True:
        if position + 12 > len(data):
            raise Refused("truncated PNG: it ends before its IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise Refused("truncated PNG: it ends inside a chunk")
        body = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise Refused("damaged PNG: a checksum does not match")
        yield kind, body
        if kind == b"IEND":
            return
        position += 12 + length


def decode_jpeg(data: bytes) -> np.ndarray:
    """A JPEG's pixels (H, W) uint8.

    Raises:
        Refused: torn, damaged, CMYK, lossless or 12-bit, coloured or of a refused size.
    """
    marker, bits, height, width, channels = jpeg_frame(data)
    check_size(height, width)
    if marker not in _JPEG_DECODABLE or bits != 8:
        raise Refused("unsupported JPEG: lossless, arithmetic or not 8 bits; convert it to PNG or DICOM")
    if channels not in (1, 3):
        raise Refused(f"colour image: a JPEG of {channels} channels (CMYK), an X-ray is gray")
    return _decode(data, "JPEG")


def jpeg_frame(data: bytes) -> tuple[int, int, int, int, int]:
    """Frame marker, bits, height, width and channels of a JPEG (or JPEG-LS) that has its end marker."""
    frame = None
    for marker, start, length in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frame = (marker, *struct.unpack_from(">BHHB", data, start))
        if marker == _JPEG_SCAN and data.find(JPEG_END, start + length) < 0:
            raise Refused("truncated JPEG: it has no end marker")
    if frame is None:
        raise Refused("damaged JPEG: it has no frame header")
    return frame


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start and length of its content) up to the first scan."""
    position, marker = 2, 0
    while marker != _JPEG_SCAN:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            raise Refused("truncated JPEG: it ends before its pixels")
        mark, marker, length = struct.unpack_from(">BBH", data, position)
        if mark != 0xFF or length < 2 or (marker in _JPEG_FRAMES and length < 8):
            raise Refused("damaged JPEG: a marker is broken")
        if position + 2 + length > len(data):
            raise Refused("truncated JPEG: it ends before its pixels")
        yield marker, position + 4, length - 2
        position += 2 + length


def _decode(data: bytes, kind: str) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Refused(f"damaged {kind}: its pixels cannot be decoded")
    return pixels if pixels.ndim == 2 else to_gray(pixels)


def decode_gif(data: bytes) -> np.ndarray:
    """A GIF's pixels (H, W) uint8: the gray of its palette's colours.

    Raises:
        Refused: torn, damaged, animated or of a refused size.
    """
    if len(data) < 13:
        raise Refused("truncated GIF: it ends inside its header")
    width, height = struct.unpack_from("<HH", data, 6)
    check_size(height, width)
    try:
        with Pillow.open(BytesIO(data), formats=["GIF"]) as picture:
            check_size(picture.height, picture.width)  # its frame may be larger than the header says
            if getattr(picture, "is_animated", False):
                raise Refused("multi-frame image: an animated GIF")
            return np.asarray(picture.convert("L"))
    except (Refused, MemoryError):
        raise
    except Exception as error:  # of any kind, for damaged ones
        raise Refused(f"damaged GIF: its pixels cannot be decoded ({type(error).__name__})") from None


def is_jsrt(data: bytes) -> bool:
    """Whether a file is as long as a raw image of the JSRT database and holds 12-bit numbers: it has no magic."""
    if len(data) != 2 * _JSRT_SIDE_PX**2:
        return False
    return 0 < np.frombuffer(data, ">u2").max() <= _JSRT_BLACK


def decode_jsrt(data: bytes) -> np.ndarray:
    """A raw image of the JSRT database (Shiraishi et al. 2000): pixels (2048, 2048) uint16, dense tissue bright.

    The file is nothing but 2048 rows of 2048 numbers: 16 bits, big-endian, 12 of them used, 0 for white.
    """
    stored = np.frombuffer(data, ">u2").reshape(_JSRT_SIDE_PX, _JSRT_SIDE_PX).astype(np.uint16)
    shown = _JSRT_BLACK - stored
    return shown << 4 | shown >> 8  # 4095 becomes 65,535
