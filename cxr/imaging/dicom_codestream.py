"""Compressed DICOM frames: check their headers before calling a codec, then decode them.

The codecs are called here rather than by pydicom, which turns all of their exceptions, MemoryError included, into
RuntimeError, and which parses the codestreams' headers again, sometimes in an endless loop. They are the packages of
the extra `dicom`; without them, images that need one are rejected.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr.errors import ImageRejectedError
from cxr.imaging.image import BLANK_PIXELS, check_ratio
from cxr.imaging.png_jpeg import JPEG_END, JPEG_MAGIC, jpeg_frame

_JPEG_FRAMES = {
    0xC0: 8,
    0xC1: 12,
    0xC2: 12,
    0xC3: 16,
    0xF7: 16,
}  # marker: maximum bits; DICOM does not use arithmetic coding
_JPEG_2000_START = b"\xff\x4f\xff\x51"
_JPEG_2000_BOXES = b"\0\0\0\x0cjP  "
_JPEG_2000_MAX_TILES = 65_535
_COD = 0xFF52
_SOT = 0xFF90
_BYTES_PER_SAMPLE = 8  # peak per codec, measured with 25 million pixels: OpenJPEG 7.1, libjpeg 6, CharLS 4
_BYTES_PER_BLOCK = 400  # OpenJPEG's overhead per code block, measured likewise
_RLE_HEADER_BYTES = 64


@dataclass(frozen=True)
class Codestream:
    """The header of a compressed frame."""

    height: int
    width: int
    samples: int
    bits: int  # per sample
    format: str
    memory_bytes: int = 0  # estimated peak of decoding


def read_header(coded: bytes) -> Codestream:
    """Parse the header of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Raises:
        ImageRejectedError: it is none of these, truncated, or of a kind that DICOM does not use.
    """
    if coded.startswith(JPEG_MAGIC):
        header = _jpeg(coded)
    elif coded.startswith(
        (_JPEG_2000_START, _JPEG_2000_BOXES)
    ):  # the boxes of .jp2 files are not allowed by the standard
        header = _jpeg_2000(coded[max(0, coded.find(_JPEG_2000_START)) :])
    else:
        raise ImageRejectedError("damaged DICOM pixels: expected JPEG, JPEG-LS or JPEG 2000, got another format")
    check_ratio(header.height * header.width, len(coded), 0 if header.format == "JPEG" else BLANK_PIXELS)
    return header


def _jpeg(coded: bytes) -> Codestream:
    marker, bits, height, width, samples = jpeg_frame(coded)
    max_bits = _JPEG_FRAMES.get(marker)
    if max_bits is None:
        raise ImageRejectedError(
            "unsupported DICOM pixels: JPEG with arithmetic or hierarchical coding; convert the file"
        )
    if not 2 <= bits <= max_bits:
        raise ImageRejectedError(f"damaged DICOM pixels: expected JPEG with at most {max_bits} bits, got {bits}")
    name = "JPEG-LS" if marker == 0xF7 else "JPEG"
    return Codestream(height, width, samples, bits, name, _BYTES_PER_SAMPLE * height * width * samples)


def _jpeg_2000(coded: bytes) -> Codestream:
    if len(coded) < 45:
        raise ImageRejectedError("truncated DICOM pixels: the JPEG 2000 codestream ends inside its header")
    if JPEG_END not in coded:
        raise ImageRejectedError("truncated DICOM pixels: the JPEG 2000 codestream has no end marker")
    right, bottom, left, top, tile_width, tile_height, _, _, samples = struct.unpack_from(">8IH", coded, 8)
    width, height, bits = right - left, bottom - top, (coded[42] & 0x7F) + 1
    if min(width, height, tile_width, tile_height, samples) <= 0 or bits > 16:
        raise ImageRejectedError(
            f"damaged DICOM pixels: JPEG 2000 header with {width} x {height} x {samples} samples of {bits} bits"
        )
    if math.ceil(width / tile_width) * math.ceil(height / tile_height) > _JPEG_2000_MAX_TILES:
        raise ImageRejectedError(f"damaged DICOM pixels: JPEG 2000 with more than {_JPEG_2000_MAX_TILES:,} tiles")
    if coded[43:45] != b"\1\1":
        raise ImageRejectedError("unsupported DICOM pixels: subsampled JPEG 2000; convert the file")
    blocks = width * height * samples // _code_block_area(coded)
    memory = _BYTES_PER_SAMPLE * width * height * samples + _BYTES_PER_BLOCK * blocks
    return Codestream(height, width, samples, bits, "JPEG 2000", memory)


def _code_block_area(coded: bytes) -> int:
    """Pixels in a code block, from the COD marker segment (ISO/IEC 15444-1 A.6.1)."""
    position = 2
    while position + 14 <= len(coded):
        marker, length = struct.unpack_from(">HH", coded, position)
        if marker == _COD:
            return 1 << (4 + (coded[position + 10] & 15) + (coded[position + 11] & 15))
        if marker == _SOT or length < 2:
            break
        position += 2 + length
    raise ImageRejectedError("damaged DICOM pixels: JPEG 2000 without a COD marker segment")


def decode_codestream(coded: bytes, header: Codestream) -> np.ndarray:
    """Decode to (height, width, samples), uint8 or uint16, as unsigned numbers; colors are not converted.

    Raises:
        ImageRejectedError: the codec, which the message names, cannot decode it, or is not installed.
    """
    codec, decode = _CODECS[header.format]
    if decode is None:
        raise ImageRejectedError(
            f"{header.format} needs a codec: expected the extra dicom; run pip install 'cxr[dicom]'"
        )
    dtype = np.dtype("<u1" if header.bits <= 8 else "<u2")
    try:
        samples = _decode_jpeg_ls(coded, decode) if header.format == "JPEG-LS" else decode(coded, version=2)
        return np.frombuffer(samples, dtype).reshape(header.height, header.width, header.samples)
    except MemoryError:
        raise
    except Exception as error:  # codecs raise many kinds
        reason = f"{codec} cannot decode the {header.format} codestream ({type(error).__name__})"
        raise ImageRejectedError(f"damaged DICOM pixels: {reason}") from None


def _decoder(module: str) -> Callable[..., Any] | None:
    """A codec's function that decodes; None if the codec is not installed."""
    try:
        return importlib.import_module(module).decode_pixel_data
    except ModuleNotFoundError:
        return None


def _decode_jpeg_ls(coded: bytes, decode: Callable[..., Any]) -> bytes | bytearray:
    decoded, info = decode(coded)
    if info["components"] == 1 or info["interleave_mode"] != 0:
        return decoded
    planes = np.frombuffer(decoded, np.uint8).reshape(info["components"], info["height"] * info["width"], -1)
    return planes.swapaxes(0, 1).tobytes()


_CODECS = {
    "JPEG": ("libjpeg", _decoder("libjpeg.utils")),
    "JPEG-LS": ("CharLS", _decoder("jpeg_ls")),
    "JPEG 2000": ("OpenJPEG", _decoder("openjpeg.utils")),
}


def decode_rle(coded: bytes, pixels: int, samples: int, bytes_per_sample: int) -> np.ndarray:
    """Decode a frame in DICOM's run-length encoding (PS3.5 annex G).

    Returns:
        (samples, pixels), uint8 or little-endian uint16.

    Raises:
        ImageRejectedError: it is truncated, or has the wrong number of segments.
    """
    planes = samples * bytes_per_sample
    if len(coded) < _RLE_HEADER_BYTES:
        raise ImageRejectedError("truncated DICOM pixels: the RLE data end inside the header")
    count, *starts = struct.unpack_from(f"<{planes + 1}I", coded)
    if count != planes:
        raise ImageRejectedError(f"damaged DICOM pixels: expected {planes} RLE segments, got {count}")
    ends = [*starts[1:], len(coded)]
    decoded = np.empty((samples, pixels, bytes_per_sample), np.uint8)
    for plane, (start, end) in enumerate(zip(starts, ends, strict=True)):
        sample, byte = divmod(plane, bytes_per_sample)  # the most significant byte comes first
        decoded[sample, :, bytes_per_sample - 1 - byte] = _rle_segment(coded[start:end], pixels)
    return decoded.view(f"<u{bytes_per_sample}")[..., 0]


def _rle_segment(segment: bytes, length: int) -> np.ndarray:
    """Decode the first `length` bytes of a segment, and no more."""
    decoded, position = bytearray(), 0
    while len(decoded) < length and position < len(segment):
        control = segment[position]
        if control < 128:
            decoded += segment[position + 1 : position + 2 + control]
            position += 2 + control
        else:  # 128 itself is a no-op
            if control > 128:
                decoded += segment[position + 1 : position + 2] * (257 - control)
            position += 1 if control == 128 else 2
    if len(decoded) < length:
        raise ImageRejectedError("truncated DICOM pixels: the RLE data end before the last row")
    return np.frombuffer(decoded, np.uint8, length)
