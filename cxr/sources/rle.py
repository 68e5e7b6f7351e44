"""Codes of masks as text: run lengths in the forms in which data sets publish them, and polygons.

    relative         SIIM-ACR Pneumothorax Segmentation (2019): pairs of the gap since the end of the previous run (or
                     the start of the image) and the run's length, along columns. What this project writes.
    absolute         Kaggle's usual form: pairs of a run's first pixel, counted from 1, and its length, along columns.
    absolute-rows    the same along rows, as in CheXmask (Gaggion et al. 2024).
    polygon          "x y x y …; x y …": polygons with their corners in pixels, edges at integers, as in COCO.

An empty mask is "-1" in each form. COCO's own run lengths become relative ones without decoding (`from_counts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import cv2
import numpy as np

from cxr.errors import ImageRejectedError
from cxr.wording import counted

EMPTY = "-1"
NO_MASK = ("", EMPTY, f"{EMPTY}.0")  # how the lists of others write it
Form = Literal["relative", "absolute", "absolute-rows", "polygon"]
FORMS: tuple[Form, ...] = get_args(Form)


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


def decode(code: str, height: int, width: int, form: Form = "relative") -> np.ndarray:
    """Decode a mask, bool (height, width).

    Raises:
        ImageRejectedError: the code does not have that form, or exceeds the image.
    """
    if form not in FORMS:
        raise ImageRejectedError(f"invalid mask code: expected the form {', '.join(FORMS)}, got {form[:40]!r}")
    if form == "polygon":
        return _filled(code, height, width)
    flat = np.zeros(height * width, bool)
    for start, end in runs(code, height, width, form).tolist():
        flat[start:end] = True
    return flat.reshape(height, width) if form == "absolute-rows" else flat.reshape(width, height).T


def runs(code: str, height: int, width: int, form: Form = "relative") -> np.ndarray:
    """The runs of a mask, int64 (K, 2): each one's first pixel from 0, and the pixel after its last one.

    Args:
        form: not "polygon".

    Raises:
        ImageRejectedError: the code does not have that form, or exceeds the image.
    """
    values, pixels = _values(code), height * width
    if form == "relative":
        starts_ends = np.cumsum(values).reshape(-1, 2)
    else:
        starts, lengths = values.reshape(-1, 2).T
        if starts.min(initial=1) < 1:
            raise ImageRejectedError(f"invalid mask code: expected first pixels from 1, got {starts.min()}")
        starts_ends = np.stack([starts - 1, starts - 1 + lengths], 1)
    if values.max(initial=0) > pixels or starts_ends.max(initial=0) > pixels:
        raise ImageRejectedError(f"mask code exceeds the image ({width} x {height} = {pixels} pixels)")
    return starts_ends


def has_absolute_order(code: str) -> bool | None:
    """Whether the runs of a code are in order and apart if read as absolute; None if it has fewer than two runs.

    Raises:
        ImageRejectedError: the code is not a list of pairs of integers.
    """
    starts, lengths = _values(code).reshape(-1, 2).T
    if len(starts) < 2:
        return None
    return bool(starts[0] >= 1 and (starts[1:] > starts[:-1] + lengths[:-1]).all())


def from_counts(counts: Sequence[int]) -> str:
    """The relative code of COCO's uncompressed counts: lengths of runs of zeros and ones in turn, along columns."""
    pairs = counts[: len(counts) // 2 * 2]  # a last run of zeros adds nothing
    return " ".join(map(str, pairs)) if any(pairs[1::2]) else EMPTY


def to_counts(code: str, pixels: int) -> list[int]:
    """COCO's uncompressed counts from a relative code for an image of so many pixels: the inverse of `from_counts`.

    Raises:
        ImageRejectedError: the code is invalid, or exceeds the image.
    """
    counts = _values(code).tolist()
    if sum(counts) > pixels:
        raise ImageRejectedError(f"mask code exceeds the image ({pixels} pixels)")
    return [*counts, pixels - sum(counts)]


def compressed(counts: Sequence[int]) -> str:
    """COCO's compressed text from its counts: the inverse of `uncompressed`."""
    text = []
    for number, count in enumerate(counts):
        value = count - counts[number - 2] if number > 2 else count
        while True:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text.append(chr(48 + (group if last else group | 32)))
            if last:
                break
    return "".join(text)


def uncompressed(text: str) -> list[int]:
    """COCO's counts from their compressed text (the format of `cocoapi/common/maskApi.c`).

    A count is written in groups of 5 bits, the lowest first, as a character from "0": bit 5 says that another group
    follows; the last group's bit 4 is the sign. From the fourth count on, it is the difference to the count two
    before.

    Raises:
        ValueError: the text is not in this format.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 30:
            raise ValueError("not a compressed code")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) and 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift or min(counts, default=0) < 0:
        raise ValueError("not a compressed code")
    return counts


def _filled(code: str, height: int, width: int) -> np.ndarray:
    """The union of polygons. A pixel belongs to a polygon if its center is inside."""
    mask = np.zeros((height, width), bool)
    for polygon in code.split(";") if code != EMPTY else ():
        corners = _corners(polygon)
        crossings = np.zeros((height, width + 1), np.uint8)  # where the polygon begins or ends along a row
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            first, last = np.clip(np.ceil(np.sort([y0, y1]) - 0.5), 0, height).astype(int)
            rows = np.arange(first, last)
            x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) if len(rows) else np.empty(0)
            crossings[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(int)] ^= 1
        mask |= np.bitwise_xor.accumulate(crossings[:, :width], 1).astype(bool)
    return mask


def _corners(polygon: str) -> np.ndarray:
    """(N, 2) x and y in pixels."""
    try:
        numbers = np.array(polygon.split(), np.float64)
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) < 6 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise ImageRejectedError(f"invalid mask code: expected polygons as pairs of numbers, got {polygon[:40]!r}")
    return numbers.reshape(-1, 2)


def _transposed(mask: np.ndarray) -> np.ndarray:
    """The transposed mask, bool (W, H), contiguous in memory."""
    return mask.T if mask.T.flags.c_contiguous else cv2.transpose(mask.view(np.uint8)).view(bool)


def _values(rle: str) -> np.ndarray:
    words = rle.split()
    if words == [EMPTY]:
        return np.empty(0, np.int64)
    expected = f"invalid mask code: expected pairs of a position and a length, or {EMPTY} for an empty mask"
    try:
        values = np.array(words, np.int64)
    except (ValueError, OverflowError):
        raise ImageRejectedError(f"{expected}, got {rle[:40]!r}, which is not only integers") from None
    if not words or len(words) % 2:
        raise ImageRejectedError(f"{expected}, got {counted(len(words), 'value')}")
    if values.min() < 0:
        raise ImageRejectedError(f"{expected}, got the negative value {values.min()}")
    return values
