"""The page of faults keeps the rows that were not measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray import fault_table


def test_new_measurements_replace_rows_and_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "faults.md"
    page.write_text(
        f"# Faults\n\n{fault_table.HEAD}\n|---|\n| lost | ingest | old | – | 9 | 9 | then |\n"
        "| lost | score | kept | 1 | 2 | 3 | then |\n\nThe end.\n"
    )
    monkeypatch.setattr(fault_table, "PAGE", page)
    monkeypatch.setattr(fault_table, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(fault_table.time, "strftime", lambda _: "now")
    fault_table.record("lost", "ingest", "new", recovery=4.4, seconds=60.6, undisturbed=None)
    fault_table.record("full disk", "train", "stops", recovery=None, seconds=7, undisturbed=5)
    fault_table.main()
    fault_table.main()
    assert page.read_text().splitlines() == [
        "# Faults",
        "",
        fault_table.HEAD,
        "|---|---|---|---|---|---|---|",
        "| full disk | train | stops | 5 | 7 | – | now |",
        "| lost | ingest | new | – | 61 | 4 | now |",
        "| lost | score | kept | 1 | 2 | 3 | then |",
        "",
        "The end.",
    ]
