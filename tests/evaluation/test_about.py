"""A report says why images have no scores, the results of the gate, and how the scores were made."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.evaluation import reports
from cxr.evaluation.run import SCORES, ReportOptions
from tests.scored_runs import IMAGES, labeled_shards, write_panel, write_run

GATE = ["lateral"] * 3 + ["frontal"] * (IMAGES - 3)


def with_errors(run: str) -> None:
    """Three images did not pass the gate, and the first two have an error."""
    path = Path(run) / SCORES / "part-00000.parquet"
    table = pq.read_table(path)
    own = [name for name in table.column_names if name.endswith((schema.PROBABILITIES, schema.DECISIONS))]
    rows = table.to_pylist()
    for row, gate in zip(rows, GATE, strict=True):
        row[schema.GATE] = gate
    for row in rows[:2]:
        row |= {schema.ERROR: "no image"} | dict.fromkeys(own)
    pq.write_table(table.from_pylist(rows, table.schema), path)


def test_rejects_and_the_gate_are_counted_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", labeled_shards(tmp_path / "shards"), 0.3)
    with_errors(run)
    result = reports.report(run, ReportOptions(resamples=5), str(tmp_path / "out"))
    text = Path(result["report"]).read_text()
    assert f"{IMAGES - 2} of {IMAGES} images of the run have scores" in text
    assert re.search(r"\| no image +\| 2 +\| 6\.7 % +\|", text)
    assert re.search(r"\| lateral +\| 3 +\| 10\.0 % +\|", text)
    rejects = list(csv.DictReader(Path(result["rejects"]).read_text().splitlines()))
    assert [row["image_id"] for row in rejects] == ["test-0000.png", "test-0001.png"]


def test_the_last_section_says_how_the_scores_were_made(tmp_path: Path) -> None:
    run = write_panel(tmp_path / "panel", labeled_shards(tmp_path / "shards"))
    settings = {"out": run, "score": {"batch_size": 48, "workers": None}}
    made = {"job": "score", "settings": settings, "seconds": 12.3, "commit": "abc", "images_per_s": 41.3}
    storage.write_json(f"{run}/result.json", made | {"versions": {"cxr": "0.1", "torch": "2"}})
    result = reports.report(run, ReportOptions(resamples=5), str(tmp_path / "out"))
    text = Path(result["report"]).read_text()
    last = text.rpartition("## About this run")[2]
    for name, value in {
        "throughput of the last pass": "41.3 images/s",
        "versions": "cxr 0.1, torch 2",
        "score.batch_size": "48",
        "bootstrap": "5 resamples of patients, seed 0",
    }.items():
        assert re.search(rf"\| {name} +\| {value} +\|", last)
    assert "workers" not in last, "options that are not set are left out"
    for name, family in (("strong", "classify"), ("masks", "lungs")):
        assert re.search(rf"\| {name} +\| {family} +\| {name} +\| 0 +\|", last)
