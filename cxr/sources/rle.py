"""Run-length encoding of masks as in the SIIM-ACR Pneumothorax Segmentation data (2019).

A code is a list of pairs, the gap since the end of the previous run (or the start of the image) and the run's length,
over the mask's pixels in column-major order. An empty mask is "-1".
"""

from __future__ import annotations

import cv2
import numpy as np

from cxr.errors import ImageRejectedError
from cxr.wording import counted

EMPTY = "-1"


def encode(mask: np.ndarray) -> str:
    """Encode a mask, bool (H, W)."""
    mask = mask.astype(bool, copy=False)
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return EMPTY
    first = int(columns[0])
    flat = _transposed(mask[:, first : columns[-1] + 1]).reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        edges = np.insert(edges, 0, 0)
    if flat[-1]:
        edges = np.append(edges, flat.size)
    values = np.diff(edges, prepend=0)
    values[0] += first * len(mask)
    return " ".join(map(str, values.tolist()))


def decode(rle: str, height: int, width: int) -> np.ndarray:
    """Decode a mask, bool (height, width).

    Raises:
        ImageRejectedError: the code is not a list of pairs of integers, or exceeds the image.
    """
    values, pixels = _values(rle), height * width
    edges = np.cumsum(values)
    if values.max(initial=0) > pixels or edges.max(initial=0) > pixels:
        raise ImageRejectedError(f"mask code exceeds the image ({width} x {height} = {pixels} pixels)")
    flat = np.zeros(pixels, bool)
    for start, end in edges.reshape(-1, 2).tolist():
        flat[start:end] = True
    return flat.reshape(width, height).T


def _transposed(mask: np.ndarray) -> np.ndarray:
    """The transposed mask, bool (W, H), contiguous in memory."""
    return mask.T if mask.T.flags.c_contiguous else cv2.transpose(mask.view(np.uint8)).view(bool)


def _values(rle: str) -> np.ndarray:
    words = rle.split()
    if words == [EMPTY]:
        return np.empty(0, np.int64)
    expected = f"invalid mask code: expected pairs of gap and length, or {EMPTY} for an empty mask"
    try:
        values = np.array(words, np.int64)
    except (ValueError, OverflowError):
        raise ImageRejectedError(f"{expected}, got {rle[:40]!r}, which is not only integers") from None
    if not words or len(words) % 2:
        raise ImageRejectedError(f"{expected}, got {counted(len(words), 'value')}")
    if values.min() < 0:
        raise ImageRejectedError(f"{expected}, got the negative value {values.min()}")
    return values
