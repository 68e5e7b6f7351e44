"""DICOM's display pipeline: stored values → modality LUT → VOI LUT or window → bright is dense (PS3.3 C.11).

Each step depends on a pixel's sample alone, so it is worked out once for every sample that can occur and looked up
for each pixel. A step that cannot be used falls through to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydicom import Dataset

from cxr.errors import ImageRejectedError
from cxr.imaging.dicom_pixels import SampleBits
from cxr.imaging.dicom_tags import code, items, number, numbers, value, words

_CHUNK_PIXELS = 1 << 20  # NumPy makes an index of 8 bytes of each pixel
_LARGEST_VALUE = 1e12  # of what a rescale may give; beyond it float64 cannot tell neighbors apart reliably


def rendered(samples: np.ndarray, bits: SampleBits, dataset: Dataset) -> np.ndarray:
    """Samples (H, W), uint8 or uint16, as the codec gave them -> full-range uint8 or uint16, bright is dense.

    Without a usable table or window, the least and the greatest value become black and white. MONOCHROME1 or an
    inverse presentation LUT turns the image, once. Padding is black. Up to 8 bits stored give uint8, more uint16.
    """
    stored = bits.values(np.arange(1 << (8 * samples.itemsize)))
    padding = _is_padding(stored, bits, dataset)
    present = _occurs(samples, len(stored)) & ~padding
    if not present.any():
        raise ImageRejectedError("blank image: all pixels are padding")
    with np.errstate(all="ignore"):
        shown_unit = _shown(_modality_values(stored, present, dataset), present, dataset)
    monochrome1 = code(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    if monochrome1 or code(dataset, "PresentationLUTShape") == "INVERSE":
        shown_unit = 1 - shown_unit
    shown_unit[padding] = 0
    result = np.dtype(np.uint8 if bits.stored <= 8 else np.uint16)
    return _looked_up(np.rint(shown_unit * np.iinfo(result).max).astype(result), samples)


def _chunks(samples: np.ndarray) -> Iterator[slice]:
    rows = max(1, _CHUNK_PIXELS // samples.shape[1])
    return (slice(first, first + rows) for first in range(0, len(samples), rows))


def _occurs(samples: np.ndarray, count: int) -> np.ndarray:
    """bool (count), whether each number is among the samples."""
    occurs = np.zeros(count, bool)
    for rows in _chunks(samples):
        occurs |= np.bincount(samples[rows].ravel(), minlength=count) > 0
    return occurs


def _looked_up(table: np.ndarray, samples: np.ndarray) -> np.ndarray:
    result = np.empty(samples.shape, table.dtype)
    for rows in _chunks(samples):
        np.take(table, samples[rows], out=result[rows], mode="clip")
    return result


def _is_padding(stored: np.ndarray, bits: SampleBits, dataset: Dataset) -> np.ndarray:
    """Pixel Padding Value, or the range from it to Pixel Padding Range Limit (PS3.3 C.7.5.1.1.2), stored values."""
    first, last = (words(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if not first:
        return np.zeros(stored.shape, bool)
    low, high = sorted((bits.value(first[0]), bits.value((last or first)[0])))
    return (stored >= low) & (stored <= high)


def _modality_values(stored: np.ndarray, present: np.ndarray, dataset: Dataset) -> np.ndarray:
    """By the first usable modality LUT, else by slope and intercept (PS3.3 C.11.1)."""
    values = stored.astype(np.float64)
    for mapped, _ in _tables(values, dataset, "ModalityLUTSequence"):
        if _tells_apart(mapped, values, present):
            return mapped
    rescaled = values * (number(dataset, "RescaleSlope") or 1.0) + (number(dataset, "RescaleIntercept") or 0.0)
    usable = _tells_apart(rescaled, values, present) and np.abs(rescaled).max() <= _LARGEST_VALUE
    return rescaled if usable else values


def _shown(values: np.ndarray, present: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Brightness in [0, 1] of every value: by VOI LUT, else by window, else between the extremes present."""
    for mapped, most in _tables(values, dataset, "VOILUTSequence"):
        if _tells_apart(mapped, values, present):
            return mapped / max(most, 1)
    for shown_unit in _windows(values, dataset):
        if _tells_apart(shown_unit, values, present):
            return shown_unit
    low, high = values[present].min(), values[present].max()
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def _tells_apart(mapped: np.ndarray, values: np.ndarray, present: np.ndarray) -> bool:
    """Whether a step shows something of the image; of an image of one value nothing is to be shown."""
    return bool(np.ptp(mapped[present]) > 0 or np.ptp(values[present]) == 0)


def _windows(values: np.ndarray, dataset: Dataset) -> Iterator[np.ndarray]:
    """Brightness by each valid window of the dataset (PS3.3 C.11.2.1.2)."""
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
    """Values through each usable table of a LUT sequence (PS3.3 C.11.1.1, C.11.2.1.1), and its largest entry."""
    for item in items(dataset, sequence):
        descriptor = words(item, "LUTDescriptor")
        if len(descriptor) != 3:
            continue
        entries, first, bits = descriptor
        table = _table(item, entries or 0x10000, bits, dataset.original_encoding[1] is not False)
        if first > 0x7FFF and values.min() < 0:  # a signed number
            first -= 0x10000
        if table.size:
            yield table[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)], table.max()


def _table(item: Dataset, entries: int, bits: int, little_endian: bool) -> np.ndarray:
    """The entries of a table, as many as are told and there; none where it has no data.

    Entries of 8 bits are bytes, two in a word, unless there is a word for each; others are words (C.11.1.1.1).
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
