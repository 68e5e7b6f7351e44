"""DICOM's display pipeline: stored values → modality LUT → VOI LUT or window → bright is dense (PS3.3 C.11).

Each step depends on a stored value alone, so it is worked out once for every value that can occur and looked
up for each pixel.
"""

from __future__ import annotations

import numpy as np
from pydicom import Dataset

from cxr.errors import Refused
from cxr.imaging.dicom_tags import number, value


def rendered(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Stored pixels (H, W), 8 or 16 bits, signed or not -> full-range uint8 or uint16, bright is dense."""
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    index = np.ascontiguousarray(stored).view(unsigned)
    candidates = np.arange(1 << (8 * unsigned.itemsize)).astype(unsigned).view(stored.dtype)
    padding = _is_padding(candidates, dataset)
    present = (np.bincount(index.ravel(), minlength=len(candidates)) > 0) & ~padding
    if not present.any():
        raise Refused("blank image: all pixels are padding")
    shown_unit = _shown(_modality_values(candidates, dataset), present, dataset)
    if value(dataset, "PhotometricInterpretation") == "MONOCHROME1" or _inverse(dataset):
        shown_unit = 1 - shown_unit
    shown_unit[padding] = 0
    result = np.dtype(np.uint8 if (number(dataset, "BitsStored") or 16) <= 8 else np.uint16)
    return np.rint(shown_unit * np.iinfo(result).max).astype(result)[index]


def _inverse(dataset: Dataset) -> bool:
    return value(dataset, "PresentationLUTShape") == "INVERSE"


def _is_padding(candidates: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Pixel Padding Value, or the range from it to Pixel Padding Range Limit (PS3.3 C.7.5.1.1.2)."""
    first = number(dataset, "PixelPaddingValue")
    if first is None:
        return np.zeros(candidates.shape, bool)
    last = number(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return (candidates >= low) & (candidates <= high)


def _modality_values(candidates: np.ndarray, dataset: Dataset) -> np.ndarray:
    values = candidates.astype(np.float64)
    looked_up = _looked_up(values, dataset, "ModalityLUTSequence")
    if looked_up is not None:
        return looked_up
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    return values * (slope or 1.0) + (intercept or 0.0)


def _shown(values: np.ndarray, present: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Brightness in [0, 1] of every value: by VOI LUT, else window, else between the extremes present."""
    low, high = values[present].min(), values[present].max()
    table = _looked_up(values, dataset, "VOILUTSequence")
    shown_unit = _windowed(values, dataset) if table is None else table / max(table.max(), 1)
    if shown_unit is not None and (np.ptp(shown_unit[present]) > 0 or low == high):
        return shown_unit
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def _windowed(values: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """The first window of the dataset (PS3.3 C.11.2.1.2), None where it has no valid one."""
    centre, width = number(dataset, "WindowCenter"), number(dataset, "WindowWidth")
    function = value(dataset, "VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _looked_up(values: np.ndarray, dataset: Dataset, sequence: str) -> np.ndarray | None:
    """Values through the first table of a LUT sequence (PS3.3 C.11.1.1), None where it has no valid one."""
    items = value(dataset, sequence)
    if not items:
        return None
    descriptor = value(items[0], "LUTDescriptor")
    if len(descriptor or ()) != 3:
        return None
    table = _table(items[0], dataset, int(descriptor[0]) or 0x10000)
    if table is None or not table.size:
        return None
    first = descriptor[1]
    if first > 0x7FFF and values.min() < 0:  # a signed number read as unsigned
        first -= 0x10000
    return table[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)]


def _table(item: Dataset, dataset: Dataset, entries: int) -> np.ndarray | None:
    """The table's values; entries of 8 bits may be packed, two in a word (PS3.3 C.11.1.1.1)."""
    data = value(item, "LUTData")
    if isinstance(data, bytes) and len(data) - entries in (0, 1):
        return np.frombuffer(data[:entries], np.uint8).astype(np.float64)
    if isinstance(data, bytes):
        little = dataset.original_encoding[1]
        return np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2").astype(np.float64)
    try:
        return np.atleast_1d(np.asarray(data, np.float64))
    except (TypeError, ValueError):
        return None
