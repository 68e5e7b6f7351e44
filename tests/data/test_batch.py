"""Conversion of columns to tensors, and the prefetching thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.data.batch import (
    HAS_BOXES,
    NO_MASK,
    BufferPool,
    ShuffleBuffer,
    stored,
    to_columns,
    to_tensors,
)
from cxr.data.prefetch import prefetched, read_ahead
from cxr.schema import MOST_BOXES, PixelFormat

PIXELS = PixelFormat(16)


def table(masks: list[np.ndarray | None]) -> pa.Table:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (len(masks), 16, 16), np.uint8)
    given = {
        schema.PIXELS: [image.tobytes() for image in images],
        schema.LABELS: [[1, 0, -1]] * len(masks),
        schema.TRUE_THETA: [[1, 0, 0.5, 0, 1, 0], *[None] * (len(masks) - 1)],
        schema.MASKS: [
            None if mask is None else [{"label": schema.LUNGS, "bits": np.packbits(mask).tobytes()}] for mask in masks
        ],
    }
    wanted = schema.row_schema(PIXELS)
    return pa.table([pa.array(given.get(f.name, [None] * len(masks)), f.type) for f in wanted], schema=wanted)


def test_columns_become_tensors_row_by_row() -> None:
    mask = np.zeros((16, 16), bool)
    mask[3:9, 2:5] = True
    rows = table([mask, None, ~mask])
    names = (schema.PIXELS, schema.LABELS, schema.TRUE_THETA, schema.MASKS)
    found = to_tensors(to_columns(rows, names, PIXELS), PIXELS)
    assert found[schema.PIXELS].numpy().tobytes() == b"".join(rows[schema.PIXELS].to_pylist())
    assert found[schema.LABELS].tolist() == [[1, 0, -1]] * 3
    assert found[schema.TRUE_THETA][0].tolist() == [1, 0, 0.5, 0, 1, 0]
    assert found[schema.TRUE_THETA][1:].isnan().all()
    assert (found[schema.MASKS][0].numpy() == mask).all()
    assert (found[schema.MASKS][1] == NO_MASK).all()
    assert (found[schema.MASKS][2].numpy() == ~mask).all()


def test_boxes_become_fractions_of_the_stored_square() -> None:
    """40 x 20 px are stored in 16 x 16, at a scale of 2.5 with 4 px of padding above and below."""
    frame = {"x_scale": 2.5, "y_scale": 2.5, "x_offset": 0.0, "y_offset": -10.0}
    given = [
        [("Mass", 10, 5, 20, 15), ("Hernia", 0, 0, 4, 4), ("Nodule", -5, 0, 100, 20), ("Mass", 41, 0, 44, 4)],
        [],
        None,
    ]
    corners = ("x_min", "y_min", "x_max", "y_max")
    boxes = [
        None if listed is None else [{"label": label, **dict(zip(corners, at, strict=True))} for label, *at in listed]
        for listed in given
    ]
    wanted = schema.row_schema(PIXELS)
    rows = pa.table(
        {
            schema.BOXES: pa.array(boxes, wanted.field(schema.BOXES).type),
            schema.RESIZE_TRANSFORM: pa.array([frame] * 3, schema.RESIZE_TRANSFORM_TYPE),
        }
    )
    assert set(rows.column_names) == set(stored([schema.BOXES]))
    columns = to_columns(rows, [schema.BOXES], PIXELS, findings=("Nodule", "Mass"))
    found = to_tensors(columns, PIXELS)
    assert found[HAS_BOXES].tolist() == [True, True, False]
    assert found[schema.BOXES].shape == (3, MOST_BOXES, 5)
    mass, nodule = found[schema.BOXES][0, :2].tolist()
    assert mass == pytest.approx([1, 0.25, 0.375, 0.5, 0.625])
    assert nodule == pytest.approx([0, 0, 0.25, 1, 0.75]), "cut off at the border"
    assert found[schema.BOXES][0, 2:].isnan().all(), "no other label, nothing outside"
    assert found[schema.BOXES][1:].isnan().all()


def test_image_ids_are_hashed() -> None:
    rows = pa.table({schema.IMAGE_ID: ["a.png", "b.png", "a.png"]})
    one, other, again = to_columns(rows, [schema.IMAGE_ID], PIXELS)[schema.IMAGE_ID].tolist()
    assert one == again != other
    assert one == 8142997129579592491, "the same in every process and on every machine"
    assert 0 <= other < 1 << 63


def test_pixels_are_not_copied_out_of_arrow() -> None:
    rows = table([None, None])
    view = to_columns(rows, [schema.PIXELS], PIXELS)[schema.PIXELS]
    assert view.base is not None
    assert not view.flags.owndata


def test_a_slice_of_a_table_gives_its_own_pixels() -> None:
    rows = table([None] * 5)
    part = to_columns(rows.slice(2, 2), [schema.PIXELS], PIXELS)[schema.PIXELS]
    whole = to_columns(rows, [schema.PIXELS], PIXELS)[schema.PIXELS]
    assert (part == whole[2:4]).all()


def test_prefetch_keeps_the_order_and_raises_errors() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise RuntimeError("the disk is gone")

    found = []
    with pytest.raises(RuntimeError, match="the disk is gone"):
        found.extend(prefetched(failing()))
    assert found in ([], [0, 1, 2, 3, 4])
    assert list(prefetched(range(50), depth=2)) == list(range(50))


def test_prefetch_thread_ends_with_its_consumer() -> None:
    before = threading.active_count()
    reading = prefetched(range(1_000_000), depth=1)
    assert next(reading) == 0
    reading.close()
    time.sleep(0.3)
    assert threading.active_count() == before


def test_reading_ahead_keeps_the_order_and_its_limit() -> None:
    started, lock = [0, 0], threading.Lock()

    def read(number: int) -> int:
        with lock:
            started[0] += 1
            started[1] = max(started[1], started[0])
        time.sleep(0.001 * (number % 3))
        return number

    taken = []
    for number in read_ahead(read, range(20), 3):
        taken.append(number)
        with lock:
            started[0] -= 1
    assert taken == [*range(20)]
    assert started[1] <= 3
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda number: 1 // number, range(2), 2))


def test_arrays_are_reused_only_when_unreferenced() -> None:
    arrays = BufferPool()
    first = arrays.empty((4, 3), np.dtype(np.uint8))
    address = first.ctypes.data
    tensor = torch.from_numpy(first)[1:]
    del first
    second = arrays.empty((4, 3), np.dtype(np.uint8))
    assert second.ctypes.data != address
    tensor.fill_(7)
    second[:] = 1
    assert (tensor == 7).all()
    del tensor
    assert arrays.empty((4, 3), np.dtype(np.uint8)).ctypes.data == address
    assert arrays.empty((2, 3), np.dtype(np.uint8)).shape == (2, 3)


def test_kept_rows_come_before_added_rows() -> None:
    rows = ShuffleBuffer(6, BufferPool())
    rows.add({"a": np.arange(4), "b": np.arange(8).reshape(4, 2)})
    rows.keep(np.array([3, 1]))
    rows.add({"a": np.arange(10, 13), "b": np.zeros((3, 2), int)})
    taken = rows.take(np.array([0, 1, 4, 2]))
    assert taken["a"].tolist() == [3, 1, 12, 10]
    assert taken["b"][:2].tolist() == [[6, 7], [2, 3]]


def test_buffer_adds_rows_with_repetitions() -> None:
    rows = ShuffleBuffer(4, BufferPool())
    rows.add({"a": np.arange(10, 14)}, np.array([3, 0, 3]))
    assert rows.take(np.arange(rows.rows))["a"].tolist() == [13, 10, 13]
