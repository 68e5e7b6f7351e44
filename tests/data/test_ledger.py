"""Division of work into parts, and resuming a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.data import ledger
from cxr.data.ledger import Fingerprint, Part, check_settings, open_ledger, plan, rows_at
from cxr.errors import UserError

SETTINGS = {"job": "test", "size": 64}


def manifest(count: int = 25) -> pa.Table:
    ids = [f"image-{i:03d}" for i in range(count)]
    splits = [schema.SPLITS[i % 3] for i in range(count)]
    columns = {schema.IMAGE_ID: ids, schema.SPLIT: splits, schema.LABELS: [[i % 2] for i in range(count)]}
    return pa.table(columns).replace_schema_metadata({"kept": "yes"})


def fingerprint(manifest: pa.Table) -> str:
    digest = Fingerprint()
    for part in plan(manifest, 4):
        digest.add(part)
    return digest.hexdigest()


def ids(parts: list[Part]) -> list[str]:
    return [image for part in parts for image in part.rows[schema.IMAGE_ID].to_pylist()]


def test_parts_have_every_image_once_and_only_their_split() -> None:
    parts = list(plan(manifest(), 4, by=schema.SPLIT))
    assert sorted(ids(parts)) == manifest()[schema.IMAGE_ID].to_pylist()
    assert [part.name for part in parts][:3] == ["test/part-00000", "test/part-00001", "train/part-00000"]
    for part in parts:
        assert part.rows.num_rows <= 4
        assert set(part.rows[schema.SPLIT].to_pylist()) == {part.name.split("/")[0]}
        assert part.rows.schema.metadata == {b"kept": b"yes"}


def test_parts_do_not_depend_on_the_order_of_the_manifest() -> None:
    shuffled = manifest().take(np.random.default_rng(0).permutation(25))
    for one, other in zip(plan(manifest(), 4), plan(shuffled, 4), strict=True):
        assert one.name == other.name
        assert one.rows.equals(other.rows)


def test_rows_are_taken_in_chunks_that_arrow_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_CHUNK", 4)
    halves = pa.concat_tables([manifest(10), manifest(9)])
    order = np.random.default_rng(0).permutation(19)
    taken = rows_at(halves, order)
    assert taken.schema.equals(halves.schema, check_metadata=True)
    assert taken.equals(halves.take(order))
    assert max(len(chunk) for chunk in taken[schema.IMAGE_ID].chunks) == 4


def test_folder_is_a_prefix_of_the_names() -> None:
    assert [part.path for part in plan(manifest(5), 3, folder="scores")] == [
        "scores/part-00000.parquet",
        "scores/part-00001.parquet",
    ]


def test_repeated_image_ids_are_rejected() -> None:
    with pytest.raises(UserError, match="image-000"):
        plan(pa.concat_tables([manifest(3), manifest(1)]), 4)


def test_todo_lists_parts_without_a_file(tmp_path: Path) -> None:
    parts = list(plan(manifest(), 4, by=schema.SPLIT))
    begun = open_ledger(str(tmp_path), SETTINGS, "abc")
    assert begun.todo(parts) == parts
    storage.write_bytes(begun.file(parts[1]), b"done")
    again = open_ledger(str(tmp_path), SETTINGS, "abc")
    assert again.todo(parts) == [parts[0], *parts[2:]]


def test_other_settings_are_rejected_by_name(tmp_path: Path) -> None:
    check_settings(str(tmp_path), SETTINGS)
    open_ledger(str(tmp_path), SETTINGS, "abc")
    check_settings(str(tmp_path), SETTINGS)
    with pytest.raises(UserError, match="size was 64, is now 128"):
        open_ledger(str(tmp_path), SETTINGS | {"size": 128}, "abc")
    with pytest.raises(UserError, match="size was 64, is now 128"):
        check_settings(str(tmp_path), SETTINGS | {"size": 128})


def test_differing_settings_are_described_in_one_short_line(tmp_path: Path) -> None:
    """A changed checkpoint is described by its hash, without the settings of its recipe."""
    recipes = [{f"setting-{n}": value for n in range(80)} for value in "ab"]
    recipes[1]["setting-7"] = "a"
    open_ledger(str(tmp_path), {"checkpoint_sha256": "0" * 64, "recipe": recipes[0]}, "abc")
    for other, told in (
        (
            {"checkpoint_sha256": "1" * 64, "recipe": recipes[1]},
            "checkpoint changed: SHA-256 was 0{12}, is now 1{12}",
        ),
        (
            {"checkpoint_sha256": "0" * 64, "recipe": {**recipes[0], "setting-7": "x" * 999}},
            "recipe: setting-7 was 'a', is now 'x{119}…",
        ),
    ):
        with pytest.raises(
            UserError, match=rf"contains results with different settings \({told}\): use another --out"
        ) as caught:
            open_ledger(str(tmp_path), other, "abc")
        assert len(str(caught.value)) < 400


def test_changed_labels_are_rejected(tmp_path: Path) -> None:
    open_ledger(str(tmp_path), SETTINGS, fingerprint(manifest()))
    open_ledger(str(tmp_path), SETTINGS, fingerprint(pa.concat_tables([manifest().slice(9), manifest().slice(0, 9)])))
    labels = pa.array([[1]] * 25)
    changed = manifest().set_column(2, schema.LABELS, labels)
    with pytest.raises(UserError, match="have changed"):
        open_ledger(str(tmp_path), SETTINGS, fingerprint(changed))
