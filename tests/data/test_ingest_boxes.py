"""Boxes from ingest to batches: counted, checked before anything is written, complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data import ingest, ledger, shards
from cxr.data.ledger import Part
from cxr.data.manifest_files import write_parts
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources.manifest import manifest_table
from cxr.sources.true_boxes import BoxCounts

PIXELS = PixelFormat(32)
LEFT, BEYOND, OUTSIDE = (1, 1, 9, 9), (30, 30, 50, 50), (100, 100, 120, 120)  # in images of 40 x 40


def part_of(folder: Path, boxes: list[list[tuple[int, ...]]]) -> Part:
    """Images with these boxes, without an image size in any table."""
    listed: list[list[dict[str, Any]]] = [
        [dict(zip(("label", "x_min", "y_min", "x_max", "y_max"), ("Mass", *box), strict=True)) for box in of_image]
        for of_image in boxes
    ]
    for number in range(len(boxes)):
        assert cv2.imwrite(str(folder / f"{number}.png"), np.random.default_rng(number).integers(0, 99, (40, 40)))
    columns = {
        schema.IMAGE_ID: pa.array([f"{number}.png" for number in range(len(boxes))]),
        schema.SOURCE_URI: pa.array([str(folder / f"{number}.png") for number in range(len(boxes))]),
        schema.SPLIT: pa.array(["train"] * len(boxes)),
        schema.BOXES: pa.array(listed, schema.MANIFEST.field(schema.BOXES).type),
    }
    return Part("train/part-00000", manifest_table(columns))


def written(folder: Path, part: Part) -> ingest._Contents:
    book = ledger.open_ledger(str(folder / "shards"), {}, "")
    ingest.PartWriter(book, PIXELS)(part)
    return ingest._contents(book, *write_parts(str(folder / "plan"), [part]))


def test_a_part_counts_boxes_inside_and_outside(tmp_path: Path) -> None:
    contents = written(tmp_path, part_of(tmp_path, [[LEFT] * 9 + [BEYOND], [], [OUTSIDE]]))
    assert contents.boxes == BoxCounts(boxes=11, clipped=2, dropped=1, outside_file=1)
    assert contents.most_boxes == 10
    assert contents.boxes.notes() == [
        "boxes clipped to their images: 2 of 11; 1 of these were entirely outside and are dropped"
    ]


def test_a_part_with_boxes_outside_its_images_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 5 of 6 boxes outside. They were read as pixels of the image"):
        written(tmp_path, part_of(tmp_path, [[OUTSIDE] * 5, [LEFT]]))
    assert not list(tmp_path.rglob("*.parquet"))


def test_batches_have_all_boxes_of_an_image(tmp_path: Path) -> None:
    """There is no hidden limit in training."""
    part = part_of(tmp_path, [[LEFT] * 90, [LEFT]])
    contents = written(tmp_path, part)
    about = {"kind": shards.KIND, "version": 1, "source": "made", "archive": "", "findings": ["Mass"], "rejects": 0}
    about |= {
        "pixels": {"size": 32, "bits": 8},
        "row_group_rows": 8,
        "parts": {"train": [{"path": part.path, "rows": 2}]},
    }
    for most, trouble in ((contents.most_boxes, None), (None, "expected at most 64 boxes per image, got 90")):
        told = about | ({"most_boxes": most} if most else {})
        storage.write_json(str(tmp_path / "shards" / shards.ARCHIVE_FILE), told)
        stream = ShardStream(shards.read_info(str(tmp_path / "shards")), "train", (schema.BOXES,), batch_size=2)
        if trouble:
            with pytest.raises(UserError, match=trouble):
                list(stream.every())
            continue
        (batch,) = stream.every()
        assert batch[schema.BOXES].shape == (2, 90, 5)
        assert (~batch[schema.BOXES][..., 0].isnan()).sum(1).tolist() == [90, 1]
    assert pq.read_metadata(tmp_path / "shards" / part.path).num_rows == 2
