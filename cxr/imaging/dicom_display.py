"""DICOM's display pipeline: stored values → modality LUT → VOI LUT or window → dense tissue is bright (PS3.3 C.11).

Each step depends only on the pixel's value, so it is computed once per possible value and applied by table lookup.
An unusable step falls through to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from pydicom import Dataset

from cxr.errors import ImageRejectedError
from cxr.imaging.dicom_pixels import SampleBits
from cxr.imaging.dicom_tags import code, items, number, numbers, value, words

_CHUNK_PIXELS = 1 << 20  # NumPy's lookup needs an 8-byte index per pixel
_LARGEST_VALUE = 1e12  # limit for rescaled values: float64 may not separate neighboring values beyond it


def apply_display_pipeline(samples: np.ndarray, bits: SampleBits, dataset: Dataset) -> np.ndarray:
    """Raw samples (H, W), uint8 or uint16 -> full-range uint8 or uint16 with dense tissue bright.

    Without a usable LUT or window, the smallest and the largest value become black and white. MONOCHROME1 or an
    inverse presentation LUT inverts the image, once. Padding is black. Up to 8 bits stored give uint8, more uint16.
    """
    stored = bits.values(np.arange(1 << (8 * samples.itemsize)))
    padding = _is_padding(stored, bits, dataset)
    present = _occurring(samples, len(stored)) & ~padding
    if not present.any():
        raise ImageRejectedError("blank image: all pixels are padding")
    with np.errstate(all="ignore"):
        brightness_unit = _brightness(_modality_values(stored, present, dataset), present, dataset)
    monochrome1 = code(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    if monochrome1 or code(dataset, "PresentationLUTShape") == "INVERSE":
        brightness_unit = 1 - brightness_unit
    brightness_unit[padding] = 0
    result = np.dtype(np.uint8 if bits.stored <= 8 else np.uint16)
    return _look_up(np.rint(brightness_unit * np.iinfo(result).max).astype(result), samples)


def is_windowed(dataset: Dataset) -> bool:
    """Whether a window alone decides the brightness: no tables, no padding, not the values that occur."""
    tables = [*items(dataset, "ModalityLUTSequence"), *items(dataset, "VOILUTSequence")]
    return not tables and "PixelPaddingValue" not in dataset and any(True for _ in _windows(np.zeros(1), dataset))


def window_shows(samples: np.ndarray, bits: SampleBits, dataset: Dataset) -> bool:
    """Whether the first window of a data set that `is_windowed` keeps contrast, so that no other step replaces it."""
    extremes = bits.values(np.array([samples.min(), samples.max()]))
    brightness_unit = next(_windows(_modality_values(extremes, np.ones(2, bool), dataset), dataset))
    return bool(np.ptp(brightness_unit) > 0)


def _chunks(samples: np.ndarray) -> Iterator[slice]:
    rows = max(1, _CHUNK_PIXELS // samples.shape[1])
    return (slice(first, first + rows) for first in range(0, len(samples), rows))


def _occurring(samples: np.ndarray, count: int) -> np.ndarray:
    """bool (count): whether each value occurs among the samples."""
    return cv2.calcHist([samples], [0], None, [count], [0, count]).ravel() > 0  # five times as fast as np.bincount


def _look_up(table: np.ndarray, samples: np.ndarray) -> np.ndarray:
    result = np.empty(samples.shape, table.dtype)
    for rows in _chunks(samples):
        np.take(table, samples[rows], out=result[rows], mode="clip")
    return result


def _is_padding(stored: np.ndarray, bits: SampleBits, dataset: Dataset) -> np.ndarray:
    """Whether stored values are padding: Pixel Padding Value to Pixel Padding Range Limit (PS3.3 C.7.5.1.1.2)."""
    first, last = (words(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if not first:
        return np.zeros(stored.shape, bool)
    low, high = sorted((bits.value(first[0]), bits.value((last or first)[0])))
    return (stored >= low) & (stored <= high)


def _modality_values(stored: np.ndarray, present: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Apply the first usable modality LUT, else slope and intercept (PS3.3 C.11.1)."""
    values = stored.astype(np.float64)
    for mapped, _ in _tables(values, dataset, "ModalityLUTSequence"):
        if _keeps_contrast(mapped, values, present):
            return mapped
    rescaled = values * (number(dataset, "RescaleSlope") or 1.0) + (number(dataset, "RescaleIntercept") or 0.0)
    usable = _keeps_contrast(rescaled, values, present) and np.abs(rescaled).max() <= _LARGEST_VALUE
    return rescaled if usable else values


def _brightness(values: np.ndarray, present: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Brightness in [0, 1] of each value: by VOI LUT, else by window, else between the extremes that are present."""
    for mapped, largest in _tables(values, dataset, "VOILUTSequence"):
        if _keeps_contrast(mapped, values, present):
            return mapped / max(largest, 1)
    for brightness_unit in _windows(values, dataset):
        if _keeps_contrast(brightness_unit, values, present):
            return brightness_unit
    low, high = values[present].min(), values[present].max()
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def _keeps_contrast(mapped: np.ndarray, values: np.ndarray, present: np.ndarray) -> bool:
    """Whether a step maps the present values to more than one value, unless there is only one to begin with."""
    return bool(np.ptp(mapped[present]) > 0 or np.ptp(values[present]) == 0)


def _windows(values: np.ndarray, dataset: Dataset) -> Iterator[np.ndarray]:
    """Brightness in [0, 1] for each valid window of the data set (PS3.3 C.11.2.1.2)."""
    function = code(dataset, "VOILUTFunction")
    for center, width in zip(numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth"), strict=False):
        if not (np.isfinite(center) and width > 0):
            continue
        if function == "SIGMOID":
            yield 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500)))
        elif function == "LINEAR_EXACT":
            yield np.clip((values - center) / width + 0.5, 0, 1)
        elif width >= 1:
            yield np.clip((values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)


def _tables(values: np.ndarray, dataset: Dataset, sequence: str) -> Iterator[tuple[np.ndarray, float]]:
    """Values mapped by each usable table of a LUT sequence (PS3.3 C.11.1.1, C.11.2.1.1), and its largest entry."""
    for item in items(dataset, sequence):
        descriptor = words(item, "LUTDescriptor")
        if len(descriptor) != 3:
            continue
        entries, first, bits = descriptor
        table = _table(item, entries or 0x10000, bits, dataset.original_encoding[1] is not False)
        if first > 0x7FFF and values.min() < 0:  # the descriptor's first mapped value is signed
            first -= 0x10000
        if table.size:
            yield table[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)], table.max()


def _table(item: Dataset, entries: int, bits: int, little_endian: bool) -> np.ndarray:
    """Up to `entries` entries of a table, as far as there are data; empty without data.

    8-bit entries are packed two to a word, unless there are as many words as entries; others are words (C.11.1.1.1).
    """
    data = value(item, "LUTData")
    if isinstance(data, bytes):
        data = np.frombuffer(data + bytes(len(data) % 2), "<u2" if little_endian else ">u2")
    try:
        table = np.atleast_1d(np.asarray([] if data is None else data, np.int64)) & 0xFFFF
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    if bits <= 8 and len(table) != entries:
        table = table.astype("<u2").view(np.uint8)
    return table[:entries].astype(np.float64)
