"""Shard files are written a row group at a time: their rows, the sizes of parts, and memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data import ingest, ledger, shard_writer, shards
from cxr.data.decode import make_rows
from cxr.data.ingest import PartWriter, rows_per_part
from cxr.data.ledger import Part
from cxr.data.manifest_files import write_parts
from cxr.data.shard_writer import row_group_rows
from cxr.inference import plan
from cxr.inference.read import PART_ROWS, InputFormat, PartReader
from cxr.schema import PixelFormat
from cxr.storage import StorageError
from tests.data.test_decode import manifest
from tests.made_shards import write_shards

PIXELS = PixelFormat(32)


def part_of(folder: Path, images: int, size: int = 64) -> Part:
    """Images of noise; every fifth file is truncated."""
    uris = []
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 255, (size, size), np.uint8)
        done, data = cv2.imencode(".png", pixels)
        assert done
        (folder / f"{number:03d}.png").write_bytes(data.tobytes()[: 100 if number % 5 == 4 else None])
        uris.append(str(folder / f"{number:03d}.png"))
    return Part("train/part-00000", manifest(uris))


def test_rejects_leave_no_gaps_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_GROUP_BYTES", 3 * PIXELS.row_bytes)
    monkeypatch.setattr(shard_writer, "_GROUP_ROWS", 3)
    monkeypatch.setattr(ingest, "_DECODED_BYTES", 4 * PIXELS.row_bytes)
    part = part_of(tmp_path, 22)
    book = ledger.open_ledger(str(tmp_path / "shards"), {}, "")
    summary = PartWriter(book, PIXELS)(part)
    assert (summary["images"], len(summary["errors"])) == (22, 4)
    with pq.ParquetFile(book.file(part)) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [3] * 6
        stored = file.read()
    whole = make_rows(part.rows, PIXELS)
    assert stored.equals(whole.filter(whole[schema.ERROR].is_null()))
    assert schema.pixel_format(stored.schema) == PIXELS
    contents = ingest._contents(book, *write_parts(str(tmp_path / "plan"), [part]))
    assert (contents.rows, len(contents.rejects)) == (18, 4)
    assert contents.rejects[schema.IMAGE_ID].to_pylist() == ["004", "009", "014", "019"]


def test_a_part_without_good_images_is_an_empty_file(tmp_path: Path) -> None:
    part = Part("train/part-00000", manifest([str(tmp_path / "none.png")]))
    book = ledger.open_ledger(str(tmp_path / "shards"), {}, "")
    summary = PartWriter(book, PIXELS)(part)
    assert (summary["images"], len(summary["errors"])) == (1, 1)
    contents = ingest._contents(book, *write_parts(str(tmp_path / "plan"), [part]))
    assert (contents.rows, contents.most_boxes) == (0, 0)


def test_parts_keep_workers_busy_and_files_few() -> None:
    assert [rows_per_part(images, PixelFormat(256)) for images in (43, 393, 10_000, 112_120)] == [16, 16, 40, 438]
    files = {size: -(-10_000_000 // rows_per_part(10_000_000, PixelFormat(size))) for size in (256, 512, 1024)}
    assert files == {256: 9_766, 512: 9_766, 1024: 19_532}
    for pixels in (PixelFormat(256), PixelFormat(1024, 16), PixelFormat(4096, 16)):
        assert rows_per_part(10_000_000, pixels) * pixels.row_bytes <= 512 << 20
    assert [row_group_rows(PixelFormat(size)) for size in (256, 512, 1024, 2048, 4096)] == [128, 32, 32, 8, 2]
    assert row_group_rows(PixelFormat(4096, 16)) == 1


def test_large_shard_files_are_scored_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = shards.read_info(write_shards(tmp_path, {"train": 50, "val": 7}))
    monkeypatch.setattr(plan, "PART_BYTES", 16 * info.pixels.row_bytes)
    parts = plan._shard_parts(info, "all")
    assert parts[PART_ROWS].to_pylist() == [16, 4, 16, 4, 10, 7]
    reader = PartReader((InputFormat(info.pixels),), "off")
    read = pa.concat_tables([reader.rows(parts.slice(number, 1)) for number in range(6)])
    files = [file.uri for split in ("train", "val") for file in info.parts[split]]
    assert read.equals(pa.concat_tables(map(storage.read_parquet, files)))


_WRITE = """
import sys
from pathlib import Path
from cxr.data import ledger
from cxr.data.ingest import PartWriter
from cxr.data.ledger import Part
from cxr.schema import PixelFormat
from cxr.storage import StorageError
from tests.data.test_decode import manifest
from tests.peak_memory import peak_mib

folder, images = Path(sys.argv[1]), int(sys.argv[2])
part = Part("train/part-00000", manifest([str(folder / f"{number % 24:04d}.png") for number in range(images)]))
book = ledger.open_ledger(str(folder / f"shards-{images}"), {}, "")
PartWriter(book, PixelFormat(1024))(part)
print(int(peak_mib()))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cxr.benchmarks.throughput.archive import make_pictures

    make_pictures(tmp_path, 24, 1024)
    command = [sys.executable, "-c", _WRITE, str(tmp_path)]
    peaks = [int(subprocess.check_output([*command, str(images)], text=True)) for images in (128, 512)]
    with capsys.disabled():
        print(f"\npeak memory of a worker at 1024 px: {peaks[0]} MiB with 128 images a part, {peaks[1]} MiB with 512")
    assert peaks[1] < peaks[0] + 64


def test_a_full_disk_ends_a_shard_file_with_advice_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    part = part_of(tmp_path, 12)
    book = ledger.open_ledger(str(tmp_path / "shards"), {}, "")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"part-00000\.parquet: File too large: free some space"):
            PartWriter(book, PIXELS)(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "shards").rglob("*") if path.is_file()] == ["ledger.json"]
