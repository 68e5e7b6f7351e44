"""A run of several increments and generations, read as one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data.run_ledger import (
    REMOVED,
    Generation,
    Increment,
    OpenIncrement,
    RunLedger,
    current_rows,
    folder_of,
    moved_file,
    read_ledger,
    removed_file,
)
from cxr.errors import UserError

SETTINGS = {"archive": "/archive", "checkpoint_sha256": "0"}


def read(uri: str, row_group: int) -> pa.Table:
    columns = [schema.IMAGE_ID, schema.SOURCE_URI, schema.INCREMENT]
    return storage.read_parquet(uri, row_groups=[row_group], columns=columns)


def write(uri: str, ids: str, number: int, **more: object) -> None:
    places = [f"/{image_id}" for image_id in ids]
    columns = {schema.IMAGE_ID: [*ids], schema.SOURCE_URI: places, schema.INCREMENT: [number] * len(ids)}
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | {name: [value] * len(ids) for name, value in more.items()}), uri)


def write_part(out: Path, number: int, part: int, ids: str) -> None:
    write(str(out / folder_of(number) / f"part-{part:05d}.parquet"), ids, number)


def table(out: Path, generation: Generation) -> dict[str, int]:
    rows = [row for part in current_rows(str(out), generation, read) for row in part.to_pylist()]
    assert len({row[schema.IMAGE_ID] for row in rows}) == len(rows)
    return {row[schema.IMAGE_ID]: row[schema.INCREMENT] for row in rows}


def test_the_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_ledger(str(tmp_path)).generations == ()
    first = Generation(SETTINGS, "first run", "now", (Increment(0, 2, 5, 5, 0, reasons={"bad": 1}),))
    written = RunLedger(str(tmp_path), (first,))
    written = written.with_generation(Generation(SETTINGS | {"gate": "off"}, "gate", "now"))
    written = written.with_latest(open=OpenIncrement(1, 5, 0))
    written.write()
    again = read_ledger(str(tmp_path))
    assert again == written
    assert again.readable == first
    assert again.latest != first
    assert again.next_number == 2


def test_ledgers_of_other_jobs_are_rejected(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "ledger.json"), {"settings": {"job": "ingest"}, "fingerprint": "abc"})
    with pytest.raises(
        UserError, match=r"expected the results of cxr score in .*, got those of another job: use another folder"
    ):
        read_ledger(str(tmp_path))


def test_numbers_of_increments_are_part_of_the_names() -> None:
    assert [folder_of(number) for number in (0, 1, 12345)] == [
        "scores",
        "scores/increment-0001",
        "scores/increment-12345",
    ]


def test_the_last_row_of_each_image_counts_unless_it_was_removed(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 0, "abc")
    write_part(tmp_path, 0, 1, "def")
    write_part(tmp_path, 1, 0, "bx")
    write(removed_file(str(tmp_path), 1), "ce", 1, error=REMOVED)
    write(removed_file(str(tmp_path), 2), "x", 2, error=REMOVED)  # nothing was scored
    write_part(tmp_path, 3, 0, "c")  # is there again
    write_part(tmp_path, 4, 0, "abcdef")  # is not committed
    done = (
        Increment(0, 2, 6, 6, 0),
        Increment(1, 1, 2, 1, 1, removed=2),
        Increment(2, 0, 0, 0, 0, removed=1),
        Increment(3, 1, 1, 1, 0),
    )
    assert table(tmp_path, Generation(SETTINGS, "", "", increments=done[:1])) == dict.fromkeys("abcdef", 0)
    two = {"a": 0, "b": 1, "d": 0, "f": 0, "x": 1}
    assert table(tmp_path, Generation(SETTINGS, "", "", increments=done[:2])) == two
    assert table(tmp_path, Generation(SETTINGS, "", "", increments=done)) == {"a": 0, "b": 1, "c": 3, "d": 0, "f": 0}


def test_files_that_were_moved_have_their_new_places(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 0, "abc")
    write_part(tmp_path, 2, 0, "b")
    for number, places in ((1, {"a": "/1/a", "b": "/1/b"}), (3, {"a": "/3/a"})):
        moved = pa.table({schema.IMAGE_ID: [*places], schema.SOURCE_URI: [*places.values()]})
        storage.write_bytes(moved_file(str(tmp_path), number), b"")
        pq.write_table(moved, moved_file(str(tmp_path), number))
    done = [Increment(number, number % 2 == 0, 0, 0, 0, moved=number % 2) for number in range(4)]
    rows = current_rows(str(tmp_path), Generation(SETTINGS, "", "", increments=tuple(done)), read)
    places = {row[schema.IMAGE_ID]: row[schema.SOURCE_URI] for part in rows for row in part.to_pylist()}
    assert places == {"a": "/3/a", "b": "/b", "c": "/c"}


def test_a_missing_file_of_a_committed_increment_is_reported(tmp_path: Path) -> None:
    write_part(tmp_path, 1, 0, "ab")
    generation = Generation(SETTINGS, "", "", increments=(Increment(1, 2, 4, 4, 0),))
    with pytest.raises(UserError, match=r"expected 2 files of increment 1 in .*scores, got 1: restore"):
        table(tmp_path, generation)


def test_only_a_few_files_are_read_ahead(tmp_path: Path) -> None:
    for part in range(40):
        uri = tmp_path / folder_of(0) / f"part-{part:05d}.parquet"
        uri.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({schema.IMAGE_ID: [f"{part}"]}), uri)
    done, seen = Increment(0, files=40, images=40, new=40, changed=0), []
    started: list[str] = []

    def reading(uri: str, row_group: int) -> pa.Table:
        started.append(uri)
        return storage.read_parquet(uri, row_groups=[row_group])

    for table in current_rows(str(tmp_path), Generation(SETTINGS, "", "", increments=(done,)), reading):
        seen += table[schema.IMAGE_ID].to_pylist()
        assert len(started) <= len(seen) + 8
    assert seen == [f"{part}" for part in range(40)]


def test_readers_use_the_last_generation_that_was_complete(tmp_path: Path) -> None:
    whole, part = Increment(0, 1, 5, 5, 0), Increment(1, 1, 2, 5, 0, remaining=3)
    first, second = Generation(SETTINGS, "first run", ""), Generation(SETTINGS | {"gate": "off"}, "gate", "")

    def run(*increments: Increment, new: tuple[Increment, ...] = ()) -> RunLedger:
        return RunLedger("/out", (replace(first, increments=increments), replace(second, increments=new)))

    unfinished = run(whole, new=(part,))
    assert unfinished.readable == unfinished.generations[0]
    assert "newer scores with different settings (gate), but they are incomplete" in unfinished.note
    finished = run(whole, new=(part, Increment(2, 1, 3, 3, 0), replace(part, number=3)))
    assert finished.readable == finished.generations[1]
    assert "not complete: the next run of cxr score will score the remaining 3 images" in finished.note
    begun = run(whole)
    assert (begun.readable, begun.note) == (begun.generations[0], "")
    only = RunLedger("/out", (replace(first, increments=(part,)),))
    assert only.readable == only.latest
    assert "the remaining 3 images" in only.note
    nothing = RunLedger("/out", (replace(first, increments=(replace(part, files=0, images=0),)),))
    assert (nothing.readable, nothing.note) == (None, "")
