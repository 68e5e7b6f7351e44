"""What counts as new, changed, moved and removed; stored plans; the state after several increments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data.identity import Identity, open_identity
from cxr.data.run_ledger import REMOVED, Generation, Increment
from cxr.inference.increments import (
    KNOWN,
    Changes,
    Listing,
    PlanStore,
    StoredPlan,
    compare,
    divide,
)
from cxr.inference.latents import Origin
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
    assert changes.moved.to_pylist() == [dict(zip(KNOWN.names, ("elsewhere", "/b/elsewhere", 10, "v1"), strict=True))]
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


def stored(store: PlanStore, number: int, files: Sequence[Files], rows_per_part: int = 2) -> list[StoredPlan]:
    plans, first = [], 0
    for each in files:
        parts = divide(rows(each), number, rows_per_part, first)
        plans.append(StoredPlan(ORIGIN, parts))
        first += len(parts)
    store.write(number, plans)
    return plans


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    files = [{f"{archive}{n}": (f"/{archive}/{n}", n, "v") for n in range(3)} for archive in "ab"]
    store = store_in(tmp_path)
    plans = stored(store, 3, files)
    names = [part.name for plan in plans for part in plan.parts]
    assert names == [f"scores/increment-0003/part-{number:05d}" for number in range(4)]
    for before, after in zip(plans, store.read(3), strict=True):
        assert after.origin == before.origin
        for one, other in zip(before.parts, after.parts, strict=True):
            assert one.name == other.name
            assert one.rows.equals(other.rows)
            assert one.rows.schema.equals(other.rows.schema, check_metadata=True)
    store.shorten(3, names[:1])
    assert [[part.name for part in plan.parts] for plan in store.read(3)] == [names[:1]]
    assert store.read(4) == []


def test_the_state_follows_additions_changes_moves_and_removals(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    state: dict[str, tuple[str, int, str]] = {}
    increments: list[Increment] = []

    def next_increment(**changed: tuple[str, int, str] | None) -> Changes:
        for name, file in changed.items():
            state.pop(name) if file is None else state.update({name: file})
        generation = Generation({}, "", "", increments=tuple(increments))
        changes = compare([Listing(ORIGIN, rows(state))], store.known(generation))
        number = len(increments)
        store.write(number, [StoredPlan(ORIGIN, divide(changes.to_score[0], number, 2))])
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


def test_images_of_parts_that_were_left_out_are_new_again(tmp_path: Path) -> None:
    files: dict[str, Any] = {name: (f"/{name}", 1, "v") for name in "abcde"}
    store = store_in(tmp_path)
    plans = stored(store, 0, [files])
    store.shorten(0, [plans[0].parts[1].name])
    state = store.known(Generation({}, "", "", increments=(Increment(0, 1, 2, 5, 0, remaining=3),)))
    assert ids([state]) == [["c", "d"]]
    assert ids(compare([Listing(ORIGIN, rows(files))], state).to_score) == [["a", "b", "e"]]


def test_a_plan_that_is_written_again_keeps_the_versions_of_the_files_that_were_scored(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    plans = stored(store, 0, [{name: (f"/{name}", 1, "v") for name in "abcd"}, {"e": ("/e", 1, "v")}])
    replaced = {name: (f"/{name}", 1, "w") for name in "abcd"}
    again = [StoredPlan(ORIGIN, divide(rows(replaced), 0, 2))]
    store.write(0, again, scored=[plans[0].parts[0].name])
    generation = Generation({}, "", "", increments=(Increment(0, 2, 4, 4, 0),))
    known = store.known(generation)
    versions = dict(zip(known[schema.IMAGE_ID].to_pylist(), known[FILE_VERSION].to_pylist(), strict=True))
    assert versions == {"a": "v", "b": "v", "c": "w", "d": "w"}
    assert ids(compare([Listing(ORIGIN, rows(replaced))], known).to_score) == [["a", "b"]]


def test_a_run_that_is_killed_while_it_writes_a_plan_again_leaves_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    plans = stored(store, 0, [{"a": ("/a", 1, "v")}])

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(0, plans)
    assert [[part.name for part in plan.parts] for plan in store.read(0)] == [[plans[0].parts[0].name]]


def test_with_pseudonyms_readers_of_the_results_see_no_ids(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a secret of at least sixteen bytes")
    identity = open_identity(str(tmp_path / "key"), "", str(tmp_path / "out"), ["/archive"])
    store = PlanStore(str(tmp_path / "out"), str(tmp_path / "private"), identity)
    before = {name: (f"/a/{name}", 1, "v") for name in ("Zebrafish-gone", "Zebrafish-moved", "Zebrafish-same")}
    now = {"Zebrafish-moved": ("/b/Zebrafish-moved", 1, "v"), "Zebrafish-same": before["Zebrafish-same"]}
    store.write(0, [StoredPlan(ORIGIN, divide(rows(before), 0, 2))])
    first = Increment(0, 2, 3, 3, 0)
    changes = compare([Listing(ORIGIN, rows(now))], store.known(Generation({}, "", "", increments=(first,))))
    store.write_departures(1, changes)
    second = Increment(1, 0, 0, 0, 0, removed=1, moved=1)
    again = compare([Listing(ORIGIN, rows(now))], store.known(Generation({}, "", "", increments=(first, second))))
    assert not again.any
    shown = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path.name for path in shown] == ["removed.parquet"]
    assert not any("Zebrafish" in str(pq.read_table(path).to_pylist()) for path in shown)
