"""Reading shards: every row, the same batches for any number of workers, clear errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr import schema, storage
from cxr.data import shard_index, shards
from cxr.data.sampling import Sampling, showing
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.evaluation.ground_truth import read_truth
from cxr.sources.options import ALL_IMAGES
from tests.made_shards import Known, write_shards

COLUMNS = (schema.PIXELS, schema.TRUE_THETA, schema.MASKS)


@pytest.fixture
def made(tmp_path: Path) -> shards.ShardInfo:
    return shards.read_info(write_shards(tmp_path / "shards", {"train": 50, "val": 11}))


def numbers(batches) -> list[list[int]]:
    return [batch[schema.PIXELS][:, 0, 0].tolist() for batch in batches]


def row_groups(batch: list[int]) -> set[int]:
    """The first row of each row group that the batch has images of."""
    return {number // 20 * 20 + number % 20 // 8 * 8 for number in batch}


def stream(info: shards.ShardInfo, split: str, **settings) -> ShardStream:
    return ShardStream(info, split, COLUMNS, **({"batch_size": 4} | settings))


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_reaches_exactly_one_worker(made: shards.ShardInfo, world: int, cache_bytes: int) -> None:
    shares = [stream(made, "val", rank=r, world=world, cache_bytes=cache_bytes).every() for r in range(world)]
    seen = [number for share in shares for batch in numbers(share) for number in batch]
    assert sorted(seen) == list(range(11))


def test_two_workers_see_the_global_batches_of_one(made: shards.ShardInfo) -> None:
    one = numbers(stream(made, "train", batch_size=8).train(3))
    two = [numbers(stream(made, "train", rank=r, world=2).train(3)) for r in range(2)]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_epochs_differ_and_repeat_by_seed(made: shards.ShardInfo, cache_bytes: int) -> None:
    first, again, other = (
        numbers(stream(made, "train", cache_bytes=cache_bytes).train(epoch)) for epoch in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("world", [1, 2, 3])
def test_windows_give_every_worker_the_same_number_of_full_batches(made: shards.ShardInfo, world: int) -> None:
    streams = [stream(made, "train", rank=r, world=world, cache_bytes=0) for r in range(world)]
    for epoch in range(3):
        batches = [numbers(s.train(epoch)) for s in streams]
        assert [len(b) for b in batches] == [streams[0].steps] * world
        seen = [number for share in batches for batch in share for number in batch]
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("cache_bytes", [1 << 28, 0])
def test_a_split_smaller_than_a_step_has_equal_parts(tmp_path: Path, cache_bytes: int) -> None:
    info = shards.read_info(write_shards(tmp_path / "shards", {"train": 5}))
    loaders = [stream(info, "train", rank=rank, world=2, cache_bytes=cache_bytes) for rank in range(2)]
    assert [[len(batch[schema.PIXELS]) for batch in each.train(0)] for each in loaders] == [[2], [2]]


def test_a_window_shuffles_within_its_capacity(made: shards.ShardInfo) -> None:
    """Two row groups of 8 rows: each batch of 16 comes from two groups, and no row repeats."""
    held = 2 * 8 * made.pixels.row_bytes
    for batch in numbers(stream(made, "train", batch_size=8, cache_bytes=held).train(0))[:1]:
        assert len(row_groups(batch)) <= 2


@pytest.mark.parametrize("groups", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("sampling", [None, Sampling(schema.FINDINGS[0], (0.5,))])
def test_skipped_batches_change_nothing_and_are_not_read(
    tmp_path: Path, groups: int, sampling: Sampling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(split: str, number: int) -> Mapping[str, object]:
        return {schema.LABELS: [int(number % 9 == 0)] * len(schema.FINDINGS)}

    info = shards.read_info(write_shards(tmp_path / "shards", {"train": 75}, known=known))
    settings = {"cache_bytes": groups * 8 * info.pixels.row_bytes, "sampling": sampling}
    read, count = ShardStream._read, []
    monkeypatch.setattr(ShardStream, "_read", lambda self, group: count.append(1) or read(self, group))
    for world in (1, 2):
        made = stream(info, "train", world=world, rank=world - 1, **settings)
        every, reads = numbers(made.train(0)), []
        for skipped in range(made.steps + 1):
            count.clear()
            assert numbers(made.train(0, skipped)) == every[skipped:]
            reads.append(len(count))
        assert reads[-1] == 0
        assert reads[-2] <= max(1, groups) + len(row_groups(every[-1])), "a batch of the last windows"


def test_unknown_pose_and_mask_are_marked(made: shards.ShardInfo) -> None:
    batch = next(stream(made, "val").every())
    assert np.isnan(batch[schema.TRUE_THETA].numpy()).all()
    assert (batch[schema.MASKS] == 255).all()
    assert batch[schema.MASKS].shape == batch[schema.PIXELS].shape


def test_too_few_images_for_the_workers(made: shards.ShardInfo) -> None:
    with pytest.raises(UserError, match="expected at least 12 images for 12 workers, got 11 images in the val split"):
        stream(made, "val", world=12)


def test_unfinished_shards_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not finish"):
        shards.read_info(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["../secret.parquet", "train/../../x.parquet", "/etc/x", "s3://other/x", "file:///x", "."]
)
def test_metadata_cannot_name_files_outside_the_shards(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, {"train": 3})
    about = storage.read_json(str(folder / shards.ARCHIVE_FILE))
    rows = storage.read_parquet(str(folder / "train" / "part-00000.parquet"))
    shard_index.write_index(str(folder), [(path, rows)])
    info = shards.read_info(str(folder))
    with pytest.raises(UserError, match="expected paths of files below"):
        shard_index.find_rows(info, ["train-0001.png"])
    storage.write_json(str(folder / shards.ARCHIVE_FILE), about | {"parts": {"train": [{"path": path, "rows": 3}]}})
    with pytest.raises(UserError, match="expected paths of files below"):
        shards.read_info(str(folder))


def reject(folder: Path, image_id: str) -> None:
    """Add a rejected image to finished shards."""
    row = {"image_id": image_id, "source_uri": image_id, "split": "train", "error": "torn"}
    pq.write_table(pa.Table.from_pylist([row], schema=schema.REJECTS), folder / shards.REJECTS_FILE)
    about = storage.read_json(str(folder / shards.ARCHIVE_FILE))
    storage.write_json(str(folder / shards.ARCHIVE_FILE), about | {"rejects": 1})


def test_combined_shards_are_read_as_one(tmp_path: Path) -> None:
    members = [
        write_shards(tmp_path / "a", {"train": 30, "val": 5}),
        write_shards(tmp_path / "b", {"train": 20, "val": 4, "test": 3}),
    ]
    reject(tmp_path / "b", "torn.png")
    both = str(tmp_path / "both")
    told = shards.join_shards(both, members, ["/a", "/b"])
    info = shards.read_info(both)
    assert told == info
    assert shards.is_shards(both)
    assert ([info.rows(split) for split in schema.SPLITS], info.rejects, info.uri) == ([50, 9, 3], 1, both)
    assert storage.read_parquet(f"{both}/{shards.REJECTS_FILE}")[schema.IMAGE_ID].to_pylist() == ["torn.png"]
    seen = [number for batch in numbers(stream(info, "train").every()) for number in batch]
    assert seen == [*range(30), *range(20)]
    assert shards.joined_archives(both) == ("/a", "/b")
    with pytest.raises(
        UserError, match=r"expected different image ids in the archives combined in .*both, got 24 ids in common"
    ):
        shard_index.check_ids(info)
    shard_index.check_ids(shards.read_info(members[0]))
    assert shards.joined_archives(members[0]) == shards.joined_archives(str(tmp_path / "none")) == ()


def test_combined_shards_have_the_findings_of_all(tmp_path: Path) -> None:
    """Labels are in one order for all images, and unknown where the shards of an image do not have the finding."""

    def known(*labels: int) -> Known:
        return lambda split, number: {schema.LABELS: None if number == 3 else list(labels)}

    first = write_shards(tmp_path / "a", {"train": 4}, known=known(1, 0), findings=("Mass", "Edema"))
    second = write_shards(tmp_path / "b", {"train": 3, "val": 2}, known=known(1, 0), findings=("Hernia", "Mass"))
    third = write_shards(tmp_path / "c", {"val": 1}, known=known(), findings=())
    info = shards.join_shards(str(tmp_path / "all"), [first, second, third], ["/a", "/b", "/c"])
    assert info.findings == ("Mass", "Edema", "Hernia")
    read = [shards.read_rows(file, [schema.LABELS], info.findings) for file in info.parts["train"]]
    assert pa.concat_tables(read)[schema.LABELS].to_pylist() == [[1, 0, -1]] * 3 + [None] + [[0, -1, 1]] * 3
    batches = list(ShardStream(info, "val", (schema.PIXELS, schema.LABELS), batch_size=2).every())
    assert torch.cat([batch[schema.LABELS] for batch in batches]).tolist() == [[0, -1, 1]] * 2 + [[-1, -1, -1]]
    assert showing(info, "train", ["Hernia"]).tolist() == [False] * 4 + [True] * 3
    assert showing(info, "train", ["Mass", "Hernia"]).tolist() == [True] * 3 + [False] + [True] * 3
    joined = shards.join_shards(str(tmp_path / "joined"), [first, third], ["/a", "/c"]).uri
    truth = read_truth(joined, ALL_IMAGES, "val", [schema.LABELS])
    assert (truth.findings, truth.table[schema.LABELS].to_pylist()) == (("Mass", "Edema"), [[-1, -1]])


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"size": 16}, r"pixels in combined archives, got PixelFormat\(size=32.*/a and PixelFormat\(size=16.*/b"),
        ({"row_group_rows": 4}, "row_group_rows in combined archives, got 8 in .*/a and 4 in .*/b"),
    ],
)
def test_shards_that_differ_cannot_be_combined(tmp_path: Path, other: dict[str, Any], differing: str) -> None:
    members = [write_shards(tmp_path / "a", {"train": 3}), write_shards(tmp_path / "b", {"train": 3}, **other)]
    with pytest.raises(UserError, match=f"expected the same {differing}"):
        shards.join_shards(str(tmp_path / "both"), members, members)
    assert not shards.is_shards(str(tmp_path / "both"))


def test_image_ids_of_rejects_must_be_unique_too(tmp_path: Path) -> None:
    members = [write_shards(tmp_path / "a", {"train": 3}), write_shards(tmp_path / "b", {"val": 3})]
    shard_index.check_ids(shards.join_shards(str(tmp_path / "both"), members, ["/a", "/b"]))
    reject(tmp_path / "b", "train-0001.png")
    with pytest.raises(UserError, match=r"got 1 id in common, for example 'train-0001.png'"):
        shard_index.check_ids(shards.join_shards(str(tmp_path / "both"), members, ["/a", "/b"]))
