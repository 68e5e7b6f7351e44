"""Compressed DICOM frames: check their headers before calling a codec, then decode them.

The codecs are called here rather than by pydicom, which turns all of their exceptions, MemoryError included, into
RuntimeError, and which parses the codestreams' headers again, sometimes in an endless loop. They are those of
imagecodecs, which the extra `dicom` installs; without it, images that need one are rejected. For each format, the
fastest one is used that is exact and survives damaged files (docs/decisions/0008-dicom-codecs.md).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image as Pillow

from cxr.errors import ImageRejectedError
from cxr.imaging.image import BLANK_PIXELS, check_ratio
from cxr.imaging.jpeg_lossless import check_coded_bits
from cxr.imaging.png_jpeg import JPEG_END, JPEG_MAGIC, JPEG_PROGRESSIVE, check_scans, jpeg_frame

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
_BYTES_PER_SAMPLE = 8  # peak per codec, measured with 25 million pixels: OpenJPEG 6.9, libjpeg-turbo 3, CharLS 2
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
    max_halvings: int = 0  # how often the resolution may be halved on decoding


def read_header(coded: bytes) -> Codestream:
    """Parse the header of a JPEG, JPEG-LS or JPEG 2000 codestream, HTJ2K included.

    Raises:
        ImageRejectedError: it is none of these, truncated, or of a kind that DICOM does not use.
    """
    if coded.startswith(JPEG_MAGIC):
        header = _jpeg(coded)
    elif coded.startswith((_JPEG_2000_START, _JPEG_2000_BOXES)):
        header = _jpeg_2000(_without_boxes(coded))
    else:
        raise ImageRejectedError("damaged DICOM pixels: expected JPEG, JPEG-LS or JPEG 2000, got another format")
    exempt_pixels = BLANK_PIXELS if header.format in ("JPEG-LS", "JPEG 2000") else 0
    check_ratio(header.height * header.width, len(coded), exempt_pixels)
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
    if marker == JPEG_PROGRESSIVE:
        check_scans(coded)
    name = {0xC3: "JPEG lossless", 0xF7: "JPEG-LS"}.get(marker, "JPEG")
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
    if coded[42 : 42 + 3 * samples] != samples * (coded[42:43] + b"\1\1"):
        raise ImageRejectedError(
            "unsupported DICOM pixels: JPEG 2000 with subsampled or different components; convert the file"
        )
    levels, block_area = _coding_style(coded)
    memory = _BYTES_PER_SAMPLE * width * height * samples + _BYTES_PER_BLOCK * (
        width * height * samples // block_area
    )
    is_plain = samples == 1 and coded[42] < 0x80 and not any(coded[16:24] + coded[32:40])  # unsigned, no offsets
    return Codestream(height, width, samples, bits, "JPEG 2000", memory, levels if is_plain else 0)


def _coding_style(coded: bytes) -> tuple[int, int]:
    """Decomposition levels, and pixels of a code block, from the COD marker segment (ISO/IEC 15444-1 A.6.1)."""
    position = 2
    while position + 14 <= len(coded):
        marker, length = struct.unpack_from(">HH", coded, position)
        if marker == _COD:
            return coded[position + 9], 1 << (4 + (coded[position + 10] & 15) + (coded[position + 11] & 15))
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
    try:
        samples = decode(coded, header)
        expected = np.dtype(np.uint8 if header.bits <= 8 else np.uint16)
        return samples.view(expected).reshape(header.height, header.width, header.samples)
    except (ImageRejectedError, MemoryError):
        raise
    except ImportError:
        raise ImageRejectedError(
            f"{header.format} needs a codec that is not installed: run pip install 'cxr[dicom]'"
        ) from None
    except Exception as error:  # codecs raise many kinds
        reason = f"{codec} cannot decode the {header.format} codestream ({type(error).__name__})"
        raise ImageRejectedError(f"damaged DICOM pixels: {reason}") from None


def decode_reduced(coded: bytes, header: Codestream, halvings: int) -> np.ndarray | None:
    """Decode a gray JPEG 2000 codestream at a lower resolution, which its wavelets contain: (height, width), uint8 or
    uint16, with sides divided by 2 ** halvings and rounded up.

    Pillow contains the same OpenJPEG as imagecodecs, but can reduce. None: it cannot decode the codestream.
    """
    try:
        with Pillow.open(BytesIO(_without_boxes(coded)), formats=["JPEG2000"]) as picture:
            picture.reduce = halvings  # pyright: ignore[reportAttributeAccessIssue]
            samples = np.asarray(picture)
    except MemoryError:
        raise
    except Exception:  # the full resolution tells what is wrong
        return None
    if samples.dtype != (np.uint8 if header.bits <= 8 else np.uint16):
        return None
    return samples >> (8 * samples.itemsize - header.bits)  # Pillow scales to all bits


def _decode_jpeg(coded: bytes, header: Codestream) -> np.ndarray:
    from imagecodecs import jpeg8_decode

    unconverted = "YCBCR" if header.samples == 3 else None
    return jpeg8_decode(coded, colorspace=unconverted, outcolorspace=unconverted)


def _decode_lossless_jpeg(coded: bytes, header: Codestream) -> np.ndarray:
    samples = _decode_jpeg(coded, header)
    check_coded_bits(coded, samples)
    return samples


def _decode_jpeg_ls(coded: bytes, header: Codestream) -> np.ndarray:
    from imagecodecs import jpegls_decode

    samples = jpegls_decode(coded)
    is_planar = samples.shape == (3, header.height, header.width)  # interleave mode "none"
    return np.ascontiguousarray(np.moveaxis(samples, 0, -1)) if is_planar else samples


def _decode_jpeg_2000(coded: bytes, header: Codestream) -> np.ndarray:
    from imagecodecs import jpeg2k_decode  # decodes HTJ2K as well

    return jpeg2k_decode(_without_boxes(coded), numthreads=1)


def _without_boxes(coded: bytes) -> bytes:
    """The codestream in a .jp2 file, whose boxes the standard does not allow here."""
    return coded[max(0, coded.find(_JPEG_2000_START)) :]


_CODECS = {
    "JPEG": ("libjpeg-turbo", _decode_jpeg),
    "JPEG lossless": ("libjpeg-turbo", _decode_lossless_jpeg),
    "JPEG-LS": ("CharLS", _decode_jpeg_ls),
    "JPEG 2000": ("OpenJPEG", _decode_jpeg_2000),
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
    try:
        from imagecodecs import packbits_decode

        decoded = packbits_decode(segment, out=bytearray(length))
        if len(decoded) == length:
            return np.frombuffer(decoded, np.uint8)
    except (ImportError, RuntimeError, ValueError):  # not installed, or there are bytes after the last row
        pass
    return _rle_segment_of_any_length(segment, length)


def _rle_segment_of_any_length(segment: bytes, length: int) -> np.ndarray:
    """`_rle_segment` in a tenth of the speed; needs no codec."""
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
