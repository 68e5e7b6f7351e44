"""Detect damage inside a lossless JPEG (ITU-T T.81 annex H): the decoded samples must account for every coded bit.

The format has no checksum, and libjpeg-turbo decodes damaged data without an error. But damage usually puts a decoder
of Huffman codes out of step, so that it does not end with the last coded bit. The samples tell how many bits were
decoded: they determine the differences from their predictions, whose codes have known lengths.
"""

from __future__ import annotations

import struct

import cv2
import numpy as np

from cxr.errors import ImageRejectedError
from cxr.imaging.png_jpeg import JPEG_END, jpeg_segments

_FRAME, _TABLES, _RESTARTS, _SCAN = 0xC3, 0xC4, 0xDD, 0xDA
_CHUNK_SAMPLES = 1 << 20  # fits into the cache
_SURPLUS_BITS = 16  # the last byte is padded, and some encoders add another one


def check_coded_bits(coded: bytes, samples: np.ndarray) -> None:
    """Reject a damaged lossless JPEG; those with restart intervals, point transform or several scans are not checked.

    Args:
        samples: as decoded, (H, W) or (H, W, components), uint8 or uint16.

    Raises:
        ImageRejectedError: the samples take more or fewer bits than the scan has, or exceed their precision.
    """
    lengths: dict[int, np.ndarray] = {}  # by table: bits of the code of each category of differences
    components = samples.shape[2] if samples.ndim == 3 else 1
    bits = restarts = start = 0
    parameters = b""
    for marker, position, length in jpeg_segments(coded):
        segment = coded[position : position + length]
        if marker == _FRAME:
            bits = segment[0]
        elif marker == _TABLES:
            lengths |= _code_lengths(segment)
        elif marker == _RESTARTS:
            (restarts,) = struct.unpack(">H", segment[:2])
        elif marker == _SCAN:
            parameters, start = segment, position + length
    tables = parameters[2 : 2 + 2 * parameters[0] : 2]
    predictor, _, transform = parameters[1 + 2 * parameters[0] :]
    if restarts or transform or len(tables) != components:
        return
    end = coded.find(JPEG_END, start)
    available = 8 * (end - start - coded.count(b"\xff", start, end))  # a zero is stuffed after each 0xFF
    needed = 0
    for component, table in enumerate(tables):
        plane = samples if samples.ndim == 2 else samples[..., component]
        needed += int(_difference_counts(plane, bits, predictor) @ _bits_by_difference(lengths[table >> 4]))
    if int(samples.max()) >> bits or not 0 <= available - needed < _SURPLUS_BITS:
        raise ImageRejectedError("damaged DICOM pixels: the lossless JPEG decodes to more or fewer bits than it has")


def _code_lengths(segment: bytes) -> dict[int, np.ndarray]:
    """Tables of a DHT marker segment (T.81 B.2.4.2) by number: bits of the code of each category from 0 to 16."""
    tables = {}
    while len(segment) > 16:  # each table has 17 bytes and its symbols
        counts = np.frombuffer(segment, np.uint8, 16, 1)
        symbols = np.frombuffer(segment, np.uint8, int(counts.sum()), 17)
        lengths = np.zeros(256, np.int64)
        lengths[symbols] = np.repeat(np.arange(1, 17), counts)
        tables[segment[0] & 15] = lengths[:17]
        segment = segment[17 + len(symbols) :]
    return tables


def _bits_by_difference(lengths: np.ndarray) -> np.ndarray:
    """Bits of each difference modulo 65,536: the code of its category, and its place in the category."""
    magnitudes = np.abs(np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int64))
    categories = np.frexp(magnitudes)[1]
    return lengths[categories] + np.where(categories == 16, 0, categories)


def _difference_counts(plane: np.ndarray, bits: int, predictor: int) -> np.ndarray:
    """How often each difference modulo 65,536 from the prediction occurs; float64, 65,536 values."""
    samples = np.ascontiguousarray(plane, np.uint16)
    first_row = np.diff(samples[0], prepend=np.uint16(1 << (bits - 1)))
    first_column = np.diff(samples[:, 0])
    counts = _histogram(first_row) + _histogram(first_column)
    rows = max(1, _CHUNK_SAMPLES // samples.shape[1])
    for top in range(0, len(samples) - 1, rows):
        chunk = samples[top : top + rows + 1]
        counts += _histogram(chunk[1:, 1:] - _predicted(chunk, predictor))
    return counts


def _predicted(samples: np.ndarray, predictor: int) -> np.ndarray:
    """Predictions (T.81 table H.1), modulo 65,536, of all samples except the first row and column."""
    left, above, corner = samples[1:, :-1], samples[:-1, 1:], samples[:-1, :-1]
    if predictor <= 3:
        return {1: left, 2: above, 3: corner}[predictor]
    a, b, c = (side.astype(np.int32) for side in (left, above, corner))
    formulas = {4: lambda: a + b - c, 5: lambda: a + (b - c >> 1), 6: lambda: b + (a - c >> 1), 7: lambda: a + b >> 1}
    return formulas[predictor]().astype(np.uint16)


def _histogram(numbers: np.ndarray) -> np.ndarray:
    if not numbers.size:
        return np.zeros(1 << 16)
    return cv2.calcHist([np.atleast_2d(numbers)], [0], None, [1 << 16], [0, 1 << 16]).ravel().astype(np.float64)
