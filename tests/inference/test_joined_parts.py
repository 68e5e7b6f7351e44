"""Files of an increment's scores, joined from those of its parts; and runs of very many parts."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data.run_ledger import Generation, Increment
from cxr.inference import joined_parts, score_increment
from cxr.inference.joined_parts import join_parts, parts_of
from cxr.inference.latents import Origin
from cxr.inference.plan_store import Left, PlannedPart, PlanStore
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION
from cxr.sources.manifest import manifest_table

ORIGIN = Origin("/archive", "folder", ())


def planned(out: Path, images: int, rows_per_part: int) -> list[PlannedPart]:
    ids = [f"{number:06d}" for number in range(images)]
    rows = manifest_table(
        {schema.IMAGE_ID: pa.array(ids), schema.SOURCE_URI: pa.array([f"/archive/{i}" for i in ids])}
    )
    rows = rows.append_column(FILE_BYTES, pa.array([1] * images)).append_column(
        FILE_VERSION, pa.array(["v"] * images)
    )
    store = PlanStore(str(out), str(out / "increments"))
    store.write(0, [(ORIGIN, rows, rows_per_part)])
    return [part for plan in store.read(0) for part in plan.parts]


def scores(ids: Sequence[str], errors: Sequence[str | None]) -> bytes:
    columns = {schema.IMAGE_ID: pa.array(ids), schema.ERROR: pa.array(errors, pa.string())}
    table = pa.table([columns.get(f.name, pa.nulls(len(ids), f.type)) for f in schema.SCORES], schema=schema.SCORES)
    sink = io.BytesIO()
    pq.write_table(table.append_column(schema.INCREMENT, pa.array([0] * len(ids), pa.int32())), sink)
    return sink.getvalue()


def write(out: Path, part: PlannedPart, errors: dict[int, str] | None = None) -> None:
    first = 4 * part.number
    ids = [f"{number:06d}" for number in range(first, first + part.images)]
    content = scores(ids, [(errors or {}).get(number) for number in range(first, first + part.images)])
    storage.write_bytes(str(out / f"{part.name}.parquet"), content)


def test_parts_are_joined_in_order_into_files_of_enough_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_parts, "FILE_ROWS", 10)
    monkeypatch.setattr(joined_parts, "_GROUP_ROWS", 8)
    parts = planned(tmp_path, 30, 4)
    for part in parts:
        write(tmp_path, part, {5: "blank", 9: "file not readable: no permission", 28: "file not readable: timeout"})
    scored = [part for part in parts if part.number != 1]
    joined = join_parts(str(tmp_path), 0, scored)
    files = [tmp_path / "scores" / f"part-{number:05d}.parquet" for number in range(joined.files)]
    assert [pq.read_metadata(file).num_rows for file in files] == [12, 14]
    assert [pq.read_metadata(file).num_row_groups for file in files] == [2, 2]
    ids = [image_id for file in files for image_id in pq.read_table(file)[schema.IMAGE_ID].to_pylist()]
    assert ids == [f"{number:06d}" for number in range(30) if number // 4 != 1]
    assert dict(joined.counts.reasons) == {"file not readable: no permission": 1, "file not readable: timeout": 1}
    assert joined.unread == [(2, 1), (7, 0)]
    assert joined.sha256 == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    store = PlanStore(str(tmp_path), str(tmp_path / "increments"))
    store.write_left(0, Left([1], joined.unread))
    generation = Generation({}, "", "", (Increment(0, joined.files, 26, 30, 0, remaining=4, unread=2),))
    read = parts_of(str(tmp_path), generation, store, [schema.IMAGE_ID])
    assert {name: rows[schema.IMAGE_ID].to_pylist() for name, rows in read} == {
        part.name: [f"{number:06d}" for number in range(4 * part.number, 4 * part.number + part.images)]
        for part in scored
    }


@pytest.mark.slow
def test_a_run_of_ten_thousand_parts_is_resumed_and_joined_in_seconds(tmp_path: Path) -> None:
    parts = planned(tmp_path, 100_000, 10)
    content = scores([f"{number}" for number in range(10)], [None] * 10)
    for part in parts:
        storage.write_bytes(str(tmp_path / f"{part.name}.parquet"), content)
    start = time.perf_counter()
    store = PlanStore(str(tmp_path), str(tmp_path / "increments"))
    again = [part for plan in store.read(0) for part in plan.parts]
    assert score_increment._written(str(tmp_path), again) == {part.name for part in parts}
    resumed = time.perf_counter() - start
    joined = join_parts(str(tmp_path), 0, again)
    print(f"10,000 parts: resumed in {resumed:.1f} s, joined in {time.perf_counter() - start - resumed:.1f} s")
    assert (len(parts), joined.files) == (10_000, 1)
    assert resumed < 10
