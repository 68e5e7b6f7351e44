"""What counts as new, changed, moved and removed; stored plans; the state after several increments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.data import manifest_files
from cxr.data.identity import Identity, open_identity, read_crosswalk
from cxr.data.run_ledger import REMOVED, Generation, Increment
from cxr.inference.increments import KNOWN, Changes, Listing, compare
from cxr.inference.latents import Origin
from cxr.inference.plan_store import Left, PlannedPart, PlanStore
from cxr.inference.read import read_planned
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION
from cxr.sources.manifest import manifest_table

ORIGIN = Origin("/archive", "folder", ("Mass", "Nodule"))
Files = Mapping[str, tuple[str, int, str]]  # id -> place, size, version


def rows(files: Files) -> pa.Table:
    table = manifest_table(
        {
            schema.IMAGE_ID: pa.array([*files], pa.string()),
            schema.SOURCE_URI: pa.array([place for place, _, _ in files.values()], pa.string()),
            schema.LABELS: pa.array([[1, 0]] * len(files), pa.list_(pa.int8())),
        },
        frame_px=1024,
    )
    table = table.append_column(FILE_BYTES, pa.array([size for _, size, _ in files.values()], pa.int64()))
    return table.append_column(FILE_VERSION, pa.array([version for *_, version in files.values()], pa.string()))


def known(files: Files) -> pa.Table:
    return rows(files).select(KNOWN.names).cast(KNOWN)


def ids(tables: Sequence[pa.Table]) -> list[list[str]]:
    return [table[schema.IMAGE_ID].to_pylist() for table in tables]


def counts(changes: Changes) -> tuple[int, ...]:
    return changes.new, changes.changed, changes.unchanged, changes.moved.num_rows, changes.removed.num_rows


def test_images_are_compared_by_id_place_size_and_version() -> None:
    before = known({name: (f"/a/{name}", 10, "v1") for name in ("same", "larger", "rewritten", "elsewhere", "gone")})
    now = {
        "same": ("/a/same", 10, "v1"),
        "larger": ("/a/larger", 11, "v1"),
        "rewritten": ("/a/rewritten", 10, "v2"),
        "elsewhere": ("/b/elsewhere", 10, "v1"),
        "added": ("/a/added", 10, "v1"),
    }
    changes = compare([Listing(ORIGIN, rows(now))], before)
    assert ids(changes.to_score) == [["larger", "rewritten", "added"]]
    assert counts(changes) == (1, 2, 2, 1, 1)
    moved = changes.moved.select(KNOWN.names).to_pylist()
    assert moved == [dict(zip(KNOWN.names, ("elsewhere", "/b/elsewhere", 10, "v1"), strict=True))]
    assert ids([changes.removed]) == [["gone"]]
    assert changes.any


def test_a_dicom_file_that_was_copied_elsewhere_is_not_new_but_one_that_was_replaced_has_changed() -> None:
    before = known({name: (f"/a/{name}", 10, "v1") for name in ("copied", "replaced", "resized")})
    now = {"copied": ("/b/copied", 10, "v2"), "replaced": ("/a/replaced", 10, "v2"), "resized": ("/b/1", 11, "v2")}
    listing = rows(now)
    assert ids(compare([Listing(ORIGIN, listing, ids_identify_files=True)], before).to_score) == [
        ["replaced", "resized"]
    ]
    assert ids(compare([Listing(ORIGIN, listing)], before).to_score) == [["copied", "replaced", "resized"]]


def test_several_archives_and_an_empty_state() -> None:
    first, second = {"a": ("/1/a", 1, "")}, {"b": ("/2/b", 1, ""), "c": ("/2/c", 1, "")}
    listings = [Listing(ORIGIN, rows(first)), Listing(ORIGIN, rows(second))]
    assert counts(compare(listings, KNOWN.empty_table())) == (3, 0, 0, 0, 0)
    changes = compare(listings, known(first | second | {"d": ("/1/d", 1, "")}))
    assert (ids(changes.to_score), counts(changes)) == ([[], []], (0, 0, 3, 0, 1))
    unchanged = compare(listings, known(first | second))
    assert not unchanged.any


def store_in(folder: Path, identity: Identity | None = None) -> PlanStore:
    return PlanStore(str(folder), str(folder / "increments"), identity)


def stored(store: PlanStore, number: int, files: Sequence[Files], rows_per_part: int = 2) -> list[PlannedPart]:
    store.write(
        number, [(replace(ORIGIN, archive=f"/{n}"), rows(each), rows_per_part) for n, each in enumerate(files)]
    )
    return [part for plan in store.read(number) for part in plan.parts]


def state_of(store: PlanStore, *increments: Increment, retry: bool = True) -> dict[str, str | None]:
    """The versions of the known images."""
    known = store.known(Generation({}, "", "", increments=increments), retry=retry)
    return dict(zip(known[schema.IMAGE_ID].to_pylist(), known[FILE_VERSION].to_pylist(), strict=True))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "_PIECES_PER_FILE", 2)
    files = [{f"{archive}{n}": (f"/{archive}/{n}", n, "v") for n in range(5)} for archive in "ab"]
    store = store_in(tmp_path)
    parts = stored(store, 3, files)
    assert [part.name for part in parts] == [f"unfinished/part-0003-{number:05d}" for number in range(6)]
    assert [(part.number, part.images) for part in parts] == [(0, 2), (1, 2), (2, 1), (3, 2), (4, 2), (5, 1)]
    assert [plan.origin for plan in store.read(3)] == [replace(ORIGIN, archive=f"/{n}") for n in range(2)]
    for number, each in enumerate(files):
        read = pa.concat_tables(read_planned(part.plan, part.row_group) for part in parts[3 * number :][:3])
        assert read.equals(rows(each))
        assert read.schema.metadata == rows(each).schema.metadata
    assert store.images(3)[schema.IMAGE_ID].to_pylist() == [*files[0], *files[1]]
    assert store.read(4) == []
    assert stored(store, 3, files[:1])[-1].number == 2
    assert store.images(3)[schema.IMAGE_ID].to_pylist() == [*files[0]]


def test_the_state_follows_additions_changes_moves_and_removals(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    state: dict[str, tuple[str, int, str]] = {}
    increments: list[Increment] = []

    def next_increment(**changed: tuple[str, int, str] | None) -> Changes:
        for name, file in changed.items():
            state.pop(name) if file is None else state.update({name: file})
        generation = Generation({}, "", "", increments=tuple(increments))
        changes = compare([Listing(ORIGIN, rows(state))], store.known(generation, retry=True))
        number = len(increments)
        store.write(number, [(ORIGIN, changes.to_score[0], 2)])
        store.write_departures(number, changes)
        new, altered, unchanged, moved, removed = counts(changes)
        increments.append(Increment(number, 0, new + altered, new, altered, unchanged, removed, moved))
        return changes

    assert counts(next_increment(a=("/a", 1, "v"), b=("/b", 1, "v"), c=("/c", 1, "v"))) == (3, 0, 0, 0, 0)
    assert counts(next_increment()) == (0, 0, 3, 0, 0)
    assert not (tmp_path / "increments" / "0001").exists()
    assert counts(next_increment(a=("/a", 1, "w"), b=("/x/b", 1, "v"), c=None, d=("/d", 1, "v"))) == (1, 1, 1, 1, 1)
    marked = pq.read_table(tmp_path / "scores" / "increment-0002" / "removed.parquet").to_pylist()
    assert [(row[schema.IMAGE_ID], row[schema.ERROR], row[schema.INCREMENT]) for row in marked] == [("c", REMOVED, 2)]
    assert counts(next_increment()) == (0, 0, 3, 0, 0)
    assert counts(next_increment(b=("/x/b", 1, "w"), c=("/c", 1, "v"), d=("/y/d", 1, "w"))) == (1, 2, 1, 0, 0)
    assert counts(next_increment()) == (0, 0, 4, 0, 0)


def test_images_of_parts_that_were_left_are_new_again(tmp_path: Path) -> None:
    files: dict[str, Any] = {name: (f"/{name}", 1, "v") for name in "abcde"}
    store = store_in(tmp_path)
    stored(store, 0, [files])
    store.write_left(0, Left(parts=[0, 2]))
    state = store.known(Generation({}, "", "", increments=(Increment(0, 1, 2, 5, 0, remaining=3),)), retry=True)
    assert ids([state]) == [["c", "d"]]
    assert ids(compare([Listing(ORIGIN, rows(files))], state).to_score) == [["a", "b", "e"]]
    assert set(state_of(store, Increment(0, 1, 5, 5, 0))) == set("abcde")  # a run that was killed has left the file


def test_images_whose_file_could_not_be_read_are_scored_again_by_new_only(tmp_path: Path) -> None:
    files: dict[str, Any] = {name: (f"/{name}", 1, "v") for name in "abcd"}
    store, done = store_in(tmp_path), Increment(0, 1, 4, 4, 0, unread=2)
    stored(store, 0, [files])
    store.write_left(0, Left(unread=[(0, 1), (1, 0)]))
    assert state_of(store, done, retry=False) == dict.fromkeys("abcd", "v")
    assert state_of(store, done) == {"a": "v", "b": None, "c": None, "d": "v"}
    moved = files | {"b": ("/x/b", 1, "v")}
    listing, gone = Listing(ORIGIN, rows(moved), ids_identify_files=True), {"a": files["a"]}
    known = store.known(Generation({}, "", "", increments=(done,)), retry=True)
    changes = compare([listing], known)
    assert (ids(changes.to_score), counts(changes)) == ([["b", "c"]], (0, 2, 2, 0, 0))
    assert set(compare([Listing(ORIGIN, rows(gone))], known).removed[schema.IMAGE_ID].to_pylist()) == set("bcd")
    stored(store, 1, [{name: moved[name] for name in "bc"}])
    assert state_of(store, done, Increment(1, 1, 2, 0, 2)) == dict.fromkeys("abcd", "v")


def test_with_pseudonyms_readers_of_the_results_see_no_ids(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a secret of at least sixteen bytes")
    identity = open_identity(str(tmp_path / "key"), "", str(tmp_path / "out"), ["/archive"])
    store = PlanStore(str(tmp_path / "out"), str(tmp_path / "private"), identity)
    before = {name: (f"/a/{name}", 1, "v") for name in ("Zebrafish-gone", "Zebrafish-moved", "Zebrafish-same")}
    now = {"Zebrafish-moved": ("/b/Zebrafish-moved", 1, "v"), "Zebrafish-same": before["Zebrafish-same"]}
    stored(store, 0, [before])
    first = Increment(0, 2, 3, 3, 0)
    changes = compare(
        [Listing(ORIGIN, rows(now))], store.known(Generation({}, "", "", increments=(first,)), retry=True)
    )
    store.write_departures(1, changes)
    second = Increment(1, 0, 0, 0, 0, removed=1, moved=1)
    again = compare(
        [Listing(ORIGIN, rows(now))], store.known(Generation({}, "", "", increments=(first, second)), retry=True)
    )
    assert not again.any
    shown = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in shown} == {"removed.parquet", "moved.parquet"}
    assert not any("Zebrafish" in str(pq.read_table(path).to_pylist()) for path in shown)
    crosswalk = read_crosswalk(str(tmp_path / "crosswalk"))
    (moved,) = (pq.read_table(path) for path in shown if path.name == "moved.parquet")
    assert crosswalk.with_paths(moved)[schema.SOURCE_URI].to_pylist() == ["/b/Zebrafish-moved"]
