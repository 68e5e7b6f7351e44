"""Arrow rows -> NumPy columns -> tensors: the last step before the training or scoring device."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from threading import Lock

import numpy as np
import pyarrow as pa
import torch

from cxr import schema
from cxr.errors import UserError
from cxr.imaging.geometry import ResizeTransform
from cxr.schema import MOST_BOXES, PixelFormat

NO_MASK = 255  # fills the mask of a row without one
HAS_MASK, HAS_BOXES = "has_mask", "has_boxes"  # whether an image's mask, or its boxes, are known

_RECYCLED = 16  # maximum number of arrays in a pool
_LISTED = [np.empty(0)]
_UNUSED_REFERENCES = sys.getrefcount(_LISTED[0])  # reference count of an array that only a list refers to

Columns = dict[str, np.ndarray]  # column name -> array whose first axis is rows
# Column name -> tensor on the device. "pixels" is uint8 or uint16 (B, H, W) as stored, or float32 in [0, 1] after
# `Task.augment`.
Batch = dict[str, torch.Tensor]


def stored(names: Sequence[str]) -> list[str]:
    """The columns of rows that `to_columns` needs for these columns of a batch."""
    return list(dict.fromkeys([*names, schema.RESIZE_TRANSFORM] if schema.BOXES in names else names))


def to_columns(
    rows: pa.Table,
    names: Sequence[str],
    pixels: PixelFormat,
    mask_label: str = schema.LUNGS,
    findings: Sequence[str] = (),
    most_boxes: int = MOST_BOXES,
) -> Columns:
    """Convert rows without errors, which have the columns `stored(names)`, to arrays with rows first.

    pixels: (B, size, size) as stored, a view if Arrow allows it. labels: (B, findings) int8. true_theta: (B, 6)
    float32, NaN if unknown. masks: (B, size² / 8) uint8, the bit-packed mask of `mask_label`, and "has_mask": (B,)
    bool.
    boxes: (B, most_boxes, 5) float32: the index of the label in `findings`, then x_min, y_min, x_max, y_max as
    fractions of the square of pixels, padded with NaN, and "has_boxes": (B,) bool, false if the boxes are unknown.
    Boxes of other labels, or outside the square, are dropped. image_id: (B,) int64, a non-negative hash.

    Raises:
        UserError: an image has more than `most_boxes` boxes.
    """
    readers = {
        schema.PIXELS: lambda: {schema.PIXELS: schema.pixels_array(rows[schema.PIXELS], pixels)},
        schema.LABELS: lambda: {schema.LABELS: _matrix(rows[schema.LABELS], np.int8)},
        schema.TRUE_THETA: lambda: {schema.TRUE_THETA: _poses(rows[schema.TRUE_THETA])},
        schema.MASKS: lambda: _packed_masks(rows[schema.MASKS], pixels, mask_label),
        schema.BOXES: lambda: _boxes(rows, pixels, findings, most_boxes),
        schema.IMAGE_ID: lambda: {schema.IMAGE_ID: _hashed(rows[schema.IMAGE_ID])},
    }
    columns: Columns = {}
    for name in names:
        columns |= readers[name]()
    return columns


def _matrix(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(dtype).reshape(len(column), -1)


def _poses(column: pa.ChunkedArray) -> np.ndarray:
    unknown = [np.nan] * 6
    return np.array([pose or unknown for pose in column.to_pylist()], np.float32).reshape(len(column), 6)


def _packed_masks(column: pa.ChunkedArray, pixels: PixelFormat, label: str) -> Columns:
    """Each row's mask with this label, bit-packed to save memory until a batch needs it."""
    packed = np.zeros((len(column), (pixels.size * pixels.size + 7) // 8), np.uint8)
    present = np.zeros(len(column), bool)
    for i, masks in enumerate(column.to_pylist()):
        for mask in masks or ():
            if mask[schema.LABEL] == label:
                packed[i] = np.frombuffer(mask[schema.MASK_BITS], np.uint8)
                present[i] = True
    return {schema.MASKS: packed, HAS_MASK: present}


def _boxes(rows: pa.Table, pixels: PixelFormat, findings: Sequence[str], most: int) -> Columns:
    index = {finding: i for i, finding in enumerate(findings)}
    boxes = np.full((rows.num_rows, most, 5), np.nan, np.float32)
    listed = rows[schema.BOXES].to_pylist()
    for i, (image_boxes, transform) in enumerate(zip(listed, rows[schema.RESIZE_TRANSFORM].to_pylist(), strict=True)):
        known = [box for box in image_boxes or () if box[schema.LABEL] in index]
        if known:
            unit_boxes = _unit_boxes(known, ResizeTransform.from_dict(transform), pixels.size)
            labels = np.array([index[box[schema.LABEL]] for box in known])
            inside = np.flatnonzero((unit_boxes[:, 2:] > unit_boxes[:, :2]).all(1))
            if len(inside) > most:
                raise UserError(
                    f"expected at most {most} boxes per image, got {len(inside):,}: ingest the archive again with "
                    f"this version of cxr ingest, which records how many boxes an image has"
                )
            boxes[i, : len(inside)] = np.column_stack([labels, unit_boxes])[inside]
    return {schema.BOXES: boxes, HAS_BOXES: np.array([image_boxes is not None for image_boxes in listed], bool)}


def _hashed(column: pa.ChunkedArray) -> np.ndarray:
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in column.to_pylist()]
    return np.array([int.from_bytes(digest) >> 1 for digest in digests], np.int64)


def _unit_boxes(boxes: Sequence[Mapping[str, float]], transform: ResizeTransform, size: int) -> np.ndarray:
    """Boxes of an original image as fractions of the stored square, clipped to it, (N, 4)."""
    corners = [[box[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)] for box in boxes]
    stored_px = transform.boxes_from_original(np.array(corners).reshape(-1, 4))
    return (stored_px / size).clip(0, 1)


def take(columns: Columns, index: np.ndarray | slice) -> Columns:
    return {name: values[index] for name, values in columns.items()}


class BufferPool:
    """Arrays that are reused once nothing refers to them: allocating fresh pages costs more than filling them."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialized array that nothing else uses; tensors and views of an array keep it in use."""
        with self._lock:
            array = self._unused(shape, dtype)
            if array is None:
                array = np.empty(shape, dtype)
            self._arrays = [*self._arrays[1 - _RECYCLED :], array]
            return array

    def _unused(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        for i in range(len(self._arrays)):
            free = sys.getrefcount(self._arrays[i]) == _UNUSED_REFERENCES
            if free and self._arrays[i].shape == shape and self._arrays[i].dtype == dtype:
                return self._arrays.pop(i)
        return None


class ShuffleBuffer:
    """A buffer for `capacity` rows of columns, with memory from `arrays`."""

    def __init__(self, capacity: int, arrays: BufferPool) -> None:
        self.capacity, self.rows = capacity, 0
        self._arrays = arrays
        self._columns: Columns = {}

    def add(self, columns: Columns, index: np.ndarray | None = None) -> None:
        """Append copies of the rows at `index`, in this order and with repetitions, or of all rows."""
        index = np.arange(len(next(iter(columns.values())))) if index is None else index
        end = self.rows + len(index)
        assert end <= self.capacity
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = self._arrays.empty((self.capacity, *values.shape[1:]), values.dtype)
            np.take(values, index, axis=0, out=self._columns[name][self.rows : end], mode="clip")
        self.rows = end

    def take(self, index: np.ndarray) -> Columns:
        """A copy of the rows at `index`."""
        taken: Columns = {}
        for name, values in self._columns.items():
            out = self._arrays.empty((len(index), *values.shape[1:]), values.dtype)
            taken[name] = np.take(values, index, axis=0, out=out, mode="clip")  # "raise" would copy twice
        return taken

    def keep(self, index: np.ndarray) -> None:
        """Keep only the rows at `index`, in this order."""
        for values in self._columns.values():
            values[: len(index)] = values[index]
        self.rows = len(index)


def to_tensors(columns: Columns, pixels: PixelFormat) -> dict[str, torch.Tensor]:
    """Convert the columns of a batch to CPU tensors; masks are unpacked to (B, size, size) uint8 of 0, 1 or
    NO_MASK."""
    columns = dict(columns)
    if schema.MASKS in columns:
        present = columns.pop(HAS_MASK)
        bits = np.full((len(present), pixels.size * pixels.size), NO_MASK, np.uint8)
        bits[present] = np.unpackbits(columns[schema.MASKS][present], axis=1, count=bits.shape[1])
        columns[schema.MASKS] = bits.reshape(-1, pixels.size, pixels.size)
    return {name: torch.from_numpy(_writable(values)) for name, values in columns.items()}


def _writable(values: np.ndarray) -> np.ndarray:
    return values if values.flags.writeable else values.copy()


def to_arrow(values: torch.Tensor, kind: pa.DataType) -> pa.Array:
    """Convert a tensor (B,) or (B, n) to a column of scalars or lists."""
    array = values.float().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)).cast(kind.value_type), kind.list_size)
    if pa.types.is_list(kind):
        ends = np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]
        return pa.ListArray.from_arrays(ends, pa.array(array.reshape(-1)).cast(kind.value_type))
    return pa.array(array).cast(kind)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to a device in its stored types (uint8, not float), asynchronously for a GPU."""
    if device.type == "cpu":
        return batch
    return {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}
