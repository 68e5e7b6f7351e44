"""Decode PNG, JPEG, GIF and raw JSRT files to gray pixels.

Headers are checked first, so that bombs and truncated files are never decoded.

EXIF orientation is ignored, because annotations refer to pixels as stored. Damage inside a JPEG's coded data that
leaves its markers intact cannot be detected, because the format has no checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO

import cv2
import numpy as np
from kornia_rs import io as rust  # pyright: ignore[reportMissingModuleSource]
from PIL import Image as Pillow

from cxr.errors import ImageRejectedError
from cxr.imaging.image import (
    EncodedImage,
    Image,
    check_decoding_bytes,
    check_ratio,
    check_size,
    full_range,
    require_memory,
    to_gray,
)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
GIF_MAGIC = b"GIF8"

_PNG_GRAY = 0  # color type
_PNG_CHANNELS = {
    0: (1, 1),
    2: (3, 3),
    3: (1, 4),
    4: (2, 4),
    6: (4, 4),
}  # channels by color type: in the file, decoded
_DEFLATE_RATIO = 1032  # maximum bytes from one compressed byte

ToGray = Callable[[np.ndarray], np.ndarray]  # of BGR or BGRA pixels, HWC

JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # the last is JPEG-LS
JPEG_PROGRESSIVE = 0xC2
_JPEG_DECODABLE = {0xC0, 0xC1, JPEG_PROGRESSIVE}  # baseline, extended
_JPEG_REDUCED = {  # by channels: OpenCV's flags for 1/2, 1/4 and 1/8 of the resolution
    1: (cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    3: (cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_COLOR_8),
}
_JPEG_SCAN_MARKER = b"\xff\xda"
_JPEG_MAX_SCANS = 100  # encoders use about ten; each covers the whole image

_JSRT_SIDE_PX, _JSRT_BLACK = 2048, 4095
JSRT_BYTES = 2 * _JSRT_SIDE_PX**2


def decode_mask(data: bytes) -> np.ndarray:
    """The brightest channel (H, W), uint8 or uint16, of a mask's PNG, GIF or JPEG, which may have colors.

    Raises:
        ImageRejectedError: it is none of these, or unusable.
        MemoryError: there is not enough memory at the moment.
    """
    mask = inspect_mask(data)
    require_memory(mask.memory_bytes)
    return mask.decode().pixels


def inspect_mask(data: bytes) -> EncodedImage:
    """Check the header of a mask's PNG, GIF or JPEG.

    Raises:
        ImageRejectedError: as for `decode_mask`.
    """
    if data.startswith(PNG_MAGIC):
        return inspect_png(data, _brightest)
    return inspect_gif(data) if data.startswith(GIF_MAGIC) else inspect_jpeg(data, _brightest)


def _brightest(pixels_HWC: np.ndarray) -> np.ndarray:
    """The brightest channel of BGR or BGRA pixels (alpha ignored), so that a mask may have any color."""
    return pixels_HWC[..., :3].max(axis=2)


def inspect_png(data: bytes, to_gray: ToGray = to_gray) -> EncodedImage:
    """Check a PNG's chunks and declared size. Decoding gives uint8 or uint16.

    Raises:
        ImageRejectedError: truncated, damaged, animated or of an invalid size; on decoding: colored or damaged.
    """
    chunks = _png_chunks(data)
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise ImageRejectedError("damaged PNG: the file does not begin with an IHDR chunk")
    width, height, bits, color = struct.unpack(">IIBB", header[:10])
    check_size(height, width)
    if color not in _PNG_CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise ImageRejectedError(f"damaged PNG: invalid color type {color} with {bits} bits")
    stored_channels, decoded_channels = _PNG_CHANNELS[color]
    memory_bytes = 2 * height * width * decoded_channels * max(8, bits) // 8
    check_decoding_bytes(memory_bytes)
    lengths = {b"IDAT": 0}
    for kind, body in chunks:
        lengths[kind] = lengths.get(kind, 0) + len(body)
    if b"acTL" in lengths:
        raise ImageRejectedError("multi-frame image: an animated PNG")
    pixel_bytes = height * (width * stored_channels * bits // 8)
    if pixel_bytes > _DEFLATE_RATIO * lengths[b"IDAT"]:
        raise ImageRejectedError("damaged PNG: too few compressed bytes for the declared size")
    is_plain_gray = color == _PNG_GRAY and bits in (8, 16)
    return EncodedImage(
        height,
        width,
        memory_bytes,
        partial(_decode_png, data, (height, width), bits if is_plain_gray else None, to_gray),
    )


def _decode_png(data: bytes, shape: tuple[int, int], gray_bits: int | None, to_gray: ToGray) -> Image:
    pixels = _decode_gray(data, shape, gray_bits) if gray_bits else None
    return Image(full_range(_decode(data, "PNG", to_gray) if pixels is None else pixels))


def _decode_gray(data: bytes, shape: tuple[int, int], bits: int) -> np.ndarray | None:
    """Decode a plain gray PNG in half of OpenCV's time; None on errors, which OpenCV then diagnoses."""
    read = rust.decode_image_png_u8 if bits == 8 else rust.decode_image_png_u16
    try:
        return read(data, shape, "mono")[..., 0]
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # the decoder has no specific exceptions, and a Rust panic is not an Exception
        return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(PNG_MAGIC)
    while True:
        if position + 12 > len(data):
            raise ImageRejectedError("truncated PNG: the file ends before its IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise ImageRejectedError("truncated PNG: the file ends inside a chunk")
        body = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise ImageRejectedError("damaged PNG: a checksum does not match")
        yield kind, body
        if kind == b"IEND":
            return
        position += 12 + length


def inspect_jpeg(data: bytes, to_gray: ToGray = to_gray) -> EncodedImage:
    """Check a JPEG's frame header. Decoding gives uint8.

    Raises:
        ImageRejectedError: truncated, damaged, CMYK, lossless, 12-bit or of an invalid size; on decoding: colored or
            damaged.
    """
    marker, bits, height, width, channels = jpeg_frame(data)
    check_size(height, width)
    if marker not in _JPEG_DECODABLE or bits != 8:
        raise ImageRejectedError(
            "unsupported JPEG: lossless, arithmetic or not 8 bits; convert the file to PNG or DICOM"
        )
    if channels not in (1, 3):
        raise ImageRejectedError(
            f"color image: expected a grayscale X-ray, got a JPEG with {channels} channels (CMYK)"
        )
    check_ratio(height * width, len(data))
    check_scans(data)
    progressive = marker == JPEG_PROGRESSIVE
    memory_bytes = (
        (4 if progressive else 2) * height * width * channels
    )  # progressive decoding keeps the coefficients of all scans
    check_decoding_bytes(memory_bytes)
    return EncodedImage(
        height,
        width,
        memory_bytes,
        decode=lambda: Image(_decode(data, "JPEG", to_gray)),
        max_halvings=len(_JPEG_REDUCED[channels]),
        decode_reduced=lambda halvings: Image(_decode(data, "JPEG", to_gray, _JPEG_REDUCED[channels][halvings - 1])),
    )


def check_scans(data: bytes) -> None:
    """Reject a JPEG with so many scans, each of which may cover the whole image, that decoding takes minutes."""
    scans = data.count(_JPEG_SCAN_MARKER)
    if scans > _JPEG_MAX_SCANS:
        raise ImageRejectedError(f"damaged JPEG: expected at most {_JPEG_MAX_SCANS} scans, got {scans}")


def jpeg_frame(data: bytes) -> tuple[int, int, int, int, int]:
    """Frame marker, bits, height, width and channels of a JPEG or JPEG-LS; rejects one without an end marker."""
    frame = None
    for marker, start, length in jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frame = (marker, *struct.unpack_from(">BHHB", data, start))
        if (
            marker == _JPEG_SCAN and data.rfind(JPEG_END) < start + length
        ):  # searches from the end, where it should be
            raise ImageRejectedError("truncated JPEG: there is no end marker")
    if frame is None:
        raise ImageRejectedError("damaged JPEG: there is no frame header")
    return frame


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Segments up to the first scan: (marker, start of content, length of content)."""
    position, marker = 2, 0
    while marker != _JPEG_SCAN:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            raise ImageRejectedError("truncated JPEG: the file ends before the pixel data")
        mark, marker, length = struct.unpack_from(">BBH", data, position)
        if mark != 0xFF or length < 2 or (marker in _JPEG_FRAMES and length < 8):
            raise ImageRejectedError("damaged JPEG: invalid marker")
        if position + 2 + length > len(data):
            raise ImageRejectedError("truncated JPEG: the file ends before the pixel data")
        yield marker, position + 4, length - 2
        position += 2 + length


def _decode(data: bytes, kind: str, to_gray: ToGray, flags: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        if error.code == cv2.Error.STS_NO_MEM:
            raise MemoryError from None
        pixels = None
    if pixels is None:
        raise ImageRejectedError(f"damaged {kind}: the pixels cannot be decoded")
    return pixels if pixels.ndim == 2 else to_gray(pixels)


def inspect_gif(data: bytes) -> EncodedImage:
    """Check the header of a mask's GIF. Decoding gives uint8: the brightest channel of the palette's colors.

    Raises:
        ImageRejectedError: truncated or of an invalid size; on decoding: damaged or animated.
    """
    if len(data) < 13:
        raise ImageRejectedError("truncated GIF: the file ends inside its header")
    width, height = struct.unpack_from("<HH", data, 6)
    check_size(height, width)
    return EncodedImage(height, width, 9 * height * width, lambda: Image(_decode_gif(data)))


def _decode_gif(data: bytes) -> np.ndarray:
    try:
        with Pillow.open(BytesIO(data), formats=["GIF"]) as picture:
            check_size(picture.height, picture.width)  # the frame may be larger than the header declares
            if getattr(picture, "is_animated", False):
                raise ImageRejectedError("multi-frame image: an animated GIF")
            return _brightest(np.asarray(picture.convert("RGB")))
    except (ImageRejectedError, MemoryError):
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ImageRejectedError(f"damaged GIF: the pixels cannot be decoded ({type(error).__name__})") from None


def is_jsrt(data: bytes) -> bool:
    """Whether a file has the size of a raw JSRT image and contains 12-bit numbers; the format has no magic number."""
    if len(data) != JSRT_BYTES:
        return False
    return 0 < np.frombuffer(data, ">u2").max() <= _JSRT_BLACK


def inspect_jsrt(data: bytes) -> EncodedImage:
    """Check a raw image of the JSRT database (Shiraishi et al. 2000): pixels (2048, 2048) uint16, dense tissue
    bright.

    The file contains only 2048 rows of 2048 big-endian 16-bit numbers, of which 12 bits are used; 0 is white.
    """
    return EncodedImage(_JSRT_SIDE_PX, _JSRT_SIDE_PX, 3 * JSRT_BYTES, lambda: Image(_decode_jsrt(data)))


def _decode_jsrt(data: bytes) -> np.ndarray:
    stored = np.frombuffer(data, ">u2").reshape(_JSRT_SIDE_PX, _JSRT_SIDE_PX).astype(np.uint16)
    bright = _JSRT_BLACK - stored
    return bright << 4 | bright >> 8  # 4095 becomes 65,535
