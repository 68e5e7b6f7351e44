"""Ground-truth boxes: invalid ones are dropped, others clipped to their images, and a wrong image size is an
error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources.manifest import Manifest, manifest_table
from cxr.sources.true_boxes import PART_SHARE, frames_px, place_boxes, with_usable_boxes

NAN = float("nan")
Boxes = list[dict[str, Any]]


def box(x_min: float, y_min: float, x_max: float, y_max: float, label: str = "Mass") -> dict[str, Any]:
    corners = (schema.X_MIN, x_min), (schema.Y_MIN, y_min), (schema.X_MAX, x_max), (schema.Y_MAX, y_max)
    return {schema.LABEL: label, schema.READER: None, **dict(corners)}


def manifest(
    boxes: list[Boxes | None], frames: list[list[int] | None] | None = None, side: int | None = None
) -> Manifest:
    columns = {
        schema.IMAGE_ID: pa.array([f"{number}.png" for number in range(len(boxes))]),
        schema.BOXES: pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type),
        schema.BOXES_FRAME: pa.array(frames or [None] * len(boxes), pa.list_(pa.int32(), 2)),
    }
    return Manifest(manifest_table(columns, side), schema.FINDINGS)


def test_invalid_boxes_are_dropped_and_counted() -> None:
    good = box(1, 2, 3, 4)
    flat, inverted, huge = box(1, 1, 1, 5), box(9, 9, 5, 5), box(1, 1, 1e39, 5)
    usable = with_usable_boxes(manifest([[good, flat, box(1, NAN, 2, 3)], None, [], [inverted, huge]]))
    assert usable.table[schema.BOXES].to_pylist() == [[good], None, [], []]
    assert usable.notes == ["boxes dropped: 2 without area, 2 with an invalid coordinate"]
    assert with_usable_boxes(usable) is usable


def test_boxes_are_clipped_to_a_known_image_size() -> None:
    usable = with_usable_boxes(manifest([[box(1000, 1000, 1300, 1300)], [box(-2, 5, 30, 1024.2)], []], side=1024))
    assert usable.table[schema.BOXES].to_pylist()[:2] == [[box(1000, 1000, 1024, 1024)], [box(0, 5, 30, 1024)]]
    assert usable.notes == ["boxes clipped to their images: 2 of 2"]
    beside = with_usable_boxes(manifest([[box(1, 1, 5, 5)], [box(40, 1, 60, 5)]], [[20, 30], [20, 30]]))
    assert beside.table[schema.BOXES].to_pylist() == [[box(1, 1, 5, 5)], []]
    lost = "boxes clipped to their images: 1 of 2; 1 of these were entirely outside and are dropped"
    assert beside.notes == [lost]


def test_boxes_are_converted_to_pixels_of_their_files() -> None:
    given = manifest(
        [[box(100, 200, 300, 5000)], [box(1, 2, 30, 4)], [box(1, 2, 3, 4)], None], [[400, 500], None, None, None]
    )
    frames = frames_px(given.table[schema.BOXES_FRAME], None)
    placed = place_boxes(given.table[schema.BOXES], frames, np.array([[50, 80], [20, 20], [NAN, NAN], [9, 9]]))
    assert placed.boxes.to_pylist() == [[box(10, 40, 30, 80)], [box(1, 2, 20, 4)], None, None]
    assert (placed.counts.boxes, placed.counts.clipped, placed.counts.outside_frame) == (2, 2, 1)


@pytest.mark.parametrize(
    ("frames", "side", "told"),
    [([[64, 64]] * 9, None, "image size in the archive's tables or published layout"), (None, 64, "tables")],
)
def test_too_many_boxes_outside_a_known_image_size_are_an_error(frames: Any, side: int | None, told: str) -> None:
    boxes: list[Boxes | None] = [[box(1000, 1500, 1500, 2000)] for _ in range(4)] + [[box(1, 2, 3, 4)]] * 5
    with pytest.raises(UserError, match=f"got 4 of 9 boxes outside. .*{told}"):
        with_usable_boxes(manifest(boxes, frames, side))
    few = with_usable_boxes(manifest([*boxes[:3], *boxes[4:], []], frames, side))
    assert few.notes == ["boxes clipped to their images: 3 of 8; 3 of these were entirely outside and are dropped"]


def test_too_many_boxes_outside_their_files_are_an_error() -> None:
    given = manifest([[box(1000, 1500, 1500, 2000)] * 4, [box(1, 2, 3, 4)] * 40])
    placed = place_boxes(given.table[schema.BOXES], np.full((2, 2), NAN), np.array([[64, 64], [64, 64]]))
    placed.counts.check(PART_SHARE)  # 4 of 44 may be slips that stand together
    with pytest.raises(UserError, match=r"pixels of the image files.* width and height .* train_meta\.csv"):
        placed.counts.check()
    alone = place_boxes(given.table[schema.BOXES].slice(0, 1), np.full((1, 2), NAN), np.array([[64, 64]])).counts
    for counts, whole in ((alone, False), (alone, True)):
        with pytest.raises(UserError, match="got 4 of 4 boxes outside"):
            counts.check(whole=whole)


def test_all_boxes_outside_are_an_error() -> None:
    with pytest.raises(UserError, match="got 1 of 1 box outside"):
        with_usable_boxes(manifest([[box(100, 100, 200, 200)], []], side=64))
    with_usable_boxes(manifest([[box(60, 60, 200, 200)], []], side=64))  # the remaining part is inside
