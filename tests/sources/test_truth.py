"""truth.parquet is joined by image id, whatever the source."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import open_manifest

POSE = [1.0, 0.0, 0.25, 0.0, 1.0, -0.5]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"?")
    return tmp_path


def test_poses_and_masks_join_by_image_id(archive: Path) -> None:
    mask = {schema.LABEL: schema.LUNGS, schema.MASK_RLE: "0 4", schema.MASK_URI: None}
    truth = {
        schema.IMAGE_ID: ["c.png", "a.png", "z.png"],
        schema.POSE_UNIT: [POSE, None, POSE],
        schema.MASKS: [[mask], [], []],
    }
    types = pa.schema([schema.MANIFEST.field(name) for name in truth])
    pq.write_table(pa.table(truth, schema=types), archive / "truth.parquet")
    manifest = open_manifest(str(archive))
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.table[schema.IMAGE_ID].to_pylist() == ["a.png", "b.png", "c.png"]
    assert manifest.table[schema.POSE_UNIT].to_pylist() == [None, None, POSE]
    assert manifest.table[schema.MASKS].to_pylist() == [[], None, [mask]]
    assert "truth.parquet speaks of 2 of 3 images" in manifest.notes


def test_one_column_of_plain_lists_is_enough(archive: Path) -> None:
    pq.write_table(pa.table({schema.IMAGE_ID: ["b.png"], schema.POSE_UNIT: [POSE]}), archive / "truth.parquet")
    table = open_manifest(str(archive)).table
    assert table[schema.POSE_UNIT].to_pylist() == [None, POSE, None]
    assert table[schema.MASKS].null_count == 3


def test_the_frame_of_boxes_survives_the_join(real_data: Path, tmp_path: Path) -> None:
    for file in (real_data / "chestxray14").glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "00000001_000.png").write_bytes(b"?")
    pq.write_table(
        pa.table({schema.IMAGE_ID: ["00000001_000.png"], schema.POSE_UNIT: [POSE]}),
        tmp_path / "truth.parquet",
    )
    manifest = open_manifest(str(tmp_path))
    assert manifest.table[schema.POSE_UNIT].to_pylist() == [POSE]
    assert manifest.boxes_frame_px == 1024


@pytest.mark.parametrize("content", [b"no table", None])
def test_what_is_no_truth_is_an_error(archive: Path, content: bytes | None) -> None:
    if content is None:
        pq.write_table(pa.table({"name": ["a.png"]}), archive / "truth.parquet")
    else:
        (archive / "truth.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"truth\.parquet is no table of image_id"):
        open_manifest(str(archive))
