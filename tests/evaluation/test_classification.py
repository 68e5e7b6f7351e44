"""Scores and labels are joined by image and by finding, and missing ones are counted and reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.cli.commands import evaluate
from cxr.cli.commands import report as report_command
from cxr.data.shards import KIND, REJECTS_FILE, join_shards
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.run import SCORES, ReportOptions, read_run
from cxr.inference import plan
from cxr.metrics import classification
from cxr.phantom.archive import write_phantom
from cxr.runtime.job import write_result
from cxr.schema import FINDINGS_KEY
from cxr.sources import open_manifest
from cxr.sources.options import ALL_IMAGES
from tests.made_shards import finish_shards
from tests.written_runs import write_scored

FINDINGS = ("Mass", "Edema", "Hernia")


def labels_of(images: int) -> np.ndarray:
    """Labels with unknowns; no image has the last finding."""
    labels = (np.random.default_rng(0).random((images, 3)) < (0.4, 0.5, 0)).astype(np.int8)
    labels[::7, 1] = -1
    return labels


def write_archive(folder: Path, images: int = 60, rejects: int = 2) -> str:
    """Shards without pixels, two images a patient, all but the last ten in the test split."""
    ids = [f"{i:03d}.png" for i in range(images)]
    parts: dict[str, list[dict[str, Any]]] = {}
    for split, rows in (("test", slice(0, images - 10)), ("val", slice(images - 10, images))):
        columns = {
            schema.IMAGE_ID: ids[rows],
            schema.PATIENT_ID: [f"P{i // 2}" for i in range(images)][rows],
            schema.SPLIT: [split] * len(ids[rows]),
            schema.LABELS: pa.array(labels_of(images)[rows].tolist(), pa.list_(pa.int8())),
        }
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / split / "part-00000.parquet", row_group_size=8)
        parts[split] = [{"path": f"{split}/part-00000.parquet", "rows": len(ids[rows])}]
    broken = [{"image_id": f"broken {i}.png", "split": "test", "error": "no image"} for i in range(rejects)]
    pq.write_table(pa.Table.from_pylist(broken, schema.REJECTS), folder / REJECTS_FILE)
    about = {"kind": KIND, "version": 1, "source": "made", "archive": "", "findings": list(FINDINGS)}
    about |= {"pixels": {"size": 16, "bits": 8}, "row_group_rows": 8, "parts": parts, "rejects": rejects}
    finish_shards(folder, about)
    return str(folder)


def write_run(
    folder: Path,
    probabilities: dict[str, list[float] | None],
    findings: tuple[str, ...] = FINDINGS,
    family: str = "aecnn",
    archive: str = "",
) -> str:
    """A run of `score_archive` in two parts; None is an image with an error."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": family}}
    fields = pa.schema(
        [
            (schema.IMAGE_ID, pa.string()),
            (schema.ERROR, pa.string()),
            (schema.PROBABILITIES, pa.list_(pa.float32())),
            (schema.DECISIONS, pa.list_(pa.int8())),
        ],
        metadata={FINDINGS_KEY: json.dumps(findings)},
    )
    rows = [
        (i, None if p else "no image", p, [int(v >= 0.5) for v in p] if p else None) for i, p in probabilities.items()
    ]
    named = [dict(zip(fields.names, row, strict=True)) for row in rows]
    return write_scored(folder, settings, *(pa.Table.from_pylist(part, fields) for part in (named[:20], named[20:])))


def guesses(images: int, seed: int = 0, signal: float = 0.3) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0.1, 0.6, (images, 3)).astype(np.float32)
    return noise + np.float32(signal) * (labels_of(images) == 1)


def named(values: np.ndarray, reverse: bool = True) -> dict[str, list[float] | None]:
    """By image; in another order than the archive's."""
    rows = [(f"{i:03d}.png", row) for i, row in enumerate(values.tolist())]
    return dict(rows[::-1] if reverse else rows)


def read_csv(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(uri).read_text().splitlines()))


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return write_archive(tmp_path / "shards")


@pytest.mark.draws
def test_the_job_evaluates_the_split_and_counts_the_rest(archive: str, tmp_path: Path) -> None:
    scored = named(guesses(60)) | {"broken 0.png": None, "of another archive.png": [0.1, 0.2, 0.3]}
    scored["004.png"] = None
    scored["005.png"] = [float("nan"), 0.5, 0.5]
    del scored["006.png"]
    run = write_run(tmp_path / "run", scored, archive=archive)
    options = report_command.Options(run=(run,), out=str(tmp_path / "out"), report=ReportOptions(resamples=50))
    write_result("report", options, report_command.main(options), 0)
    result = json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    metrics = result["metrics"]
    kept = [i for i in range(50) if i not in (4, 5, 6)]
    wanted = classification.summarize(
        guesses(60)[kept],
        labels_of(60)[kept],
        guesses(60)[kept] >= 0.5,
        np.array([f"P{i // 2}" for i in kept]),
        FINDINGS,
        resamples=50,
    )
    counts = {"images": 47, "images_with_error": 3, "images_without_score": 2, "images_without_labels": 0}
    assert {name: metrics[name] for name in counts} == counts
    assert metrics["patients"] == 24
    assert metrics["auroc/Hernia"] is None
    assert metrics["auroc/Mass"] == pytest.approx(wanted.rows[0].auroc)
    assert metrics["mean_auroc"] == pytest.approx(wanted.mean.auroc)
    assert [metrics["mean_auroc_low"], metrics["mean_auroc_high"]] == pytest.approx(
        [wanted.mean.auroc_low, wanted.mean.auroc_high]
    )
    page = Path(result["report"]).read_text()
    assert "47 images of 24 patients evaluated: 2 findings with both classes." in page
    assert "Left out: 3 images with an error, 2 images without scores." in page
    assert "no positive among 47 images" in page
    for uri in result["pictures"]:
        assert cv2.imread(uri) is not None
        assert f"(pictures/{Path(uri).name})" in page
    table = read_csv(result["findings"])
    assert [row["finding"] for row in table] == [*FINDINGS, "mean"]
    assert float(table[1]["recall"]) == pytest.approx(wanted.rows[1].recall)
    assert table[2]["auroc"] == ""


def test_findings_meet_by_name_in_a_raw_archive(tmp_path: Path) -> None:
    write_phantom(str(tmp_path / "raw"), 60, size=64, prevalence=0.9)
    table = open_manifest(str(tmp_path / "raw")).table
    known = {row[schema.IMAGE_ID]: row[schema.LABELS] for row in table.to_pylist()}
    right, wrong = (schema.FINDINGS.index(finding) for finding in ("Infiltration", "Effusion"))
    scored = {i: [0.5, 1 - labels[wrong], 0.1 + 0.8 * labels[right]] for i, labels in known.items()}
    run = write_run(tmp_path / "run", scored, ("Fracture", "Effusion", "Infiltration"))
    options = ReportOptions(archive=str(tmp_path / "raw"), split="all", resamples=20)
    result = reports.report(run, options, str(tmp_path / "out"))
    metrics = result["metrics"]
    assert (metrics["auroc/Effusion"], metrics["auroc/Infiltration"]) == (0, 1)
    assert (metrics["mean_auroc"], metrics["findings_measured"], metrics["images"]) == (0.5, 2, 60)
    notes = {row["finding"]: row for row in read_csv(result["findings"])}
    assert set(notes) == {*schema.FINDINGS, "Fracture", "mean"}
    assert notes["Fracture"]["note"] == "no labels in the archive"
    assert notes["Mass"]["note"] == "not scored by the checkpoint"
    assert int(notes["Mass"]["positives"]) == sum(row[schema.FINDINGS.index("Mass")] for row in known.values())
    fewer = reports.report(run, ReportOptions(archive=str(tmp_path / "raw"), resamples=20), str(tmp_path / "test"))
    assert fewer["metrics"]["images"] == table[schema.SPLIT].to_pylist().count("test")


def test_two_runs_are_compared_on_the_images_that_both_have_scored(archive: str, tmp_path: Path) -> None:
    weaker = {i: p for i, p in named(guesses(60, 1, 0.1)).items() if i > "009.png"}
    reordered = {i: [p[2], p[0]] for i, p in weaker.items() if p}
    run = write_run(tmp_path / "run", named(guesses(60)), archive=archive)
    other = write_run(tmp_path / "other", reordered, ("Hernia", "Mass"), archive=archive)
    result = reports.report(run, ReportOptions(compare_with=other, resamples=100), str(tmp_path / "out"))
    metrics = result["metrics"]
    rows = slice(10, 50)
    labels, ours, theirs = labels_of(60)[rows, :1], guesses(60)[rows, :1], guesses(60, 1, 0.1)[rows, :1]
    tested = classification.delong(ours, theirs, labels)
    assert metrics["images_compared"] == 40
    assert metrics["p/Mass"] == pytest.approx(tested.p[0])
    assert metrics["p/Hernia"] is None
    assert metrics["mean_auroc_gain"] == pytest.approx(tested.difference[0])
    assert metrics["mean_auroc_gain_low"] < metrics["mean_auroc_gain"] < metrics["mean_auroc_gain_high"]
    assert [row["finding"] for row in read_csv(result["comparison"])] == ["Mass", "Hernia", "mean"]
    assert f"Compared with {other}, on the 40 images" in Path(result["report"]).read_text()
    same = reports.report(run, ReportOptions(compare_with=run, resamples=20), str(tmp_path / "same"))["metrics"]
    assert (same["mean_auroc_gain"], same["p/Mass"], same["images_compared"]) == (0, 1, 50)


def test_unknown_patients_count_as_one_each(archive: str, tmp_path: Path) -> None:
    part = tmp_path / "shards" / "test" / "part-00000.parquet"
    table = pq.read_table(part)
    patients = pa.array([None] * 10 + table[schema.PATIENT_ID].to_pylist()[10:], pa.string())
    pq.write_table(table.set_column(1, schema.PATIENT_ID, patients), part, row_group_size=8)
    run = write_run(tmp_path / "run", named(guesses(60)), archive=archive)
    assert reports.report(run, ReportOptions(resamples=20), str(tmp_path / "out"))["metrics"]["patients"] == 10 + 20


def test_rejected_images_belong_to_the_truth(archive: str) -> None:
    known = read_truth(archive, ALL_IMAGES, "test", [schema.LABELS])
    assert known.table.num_rows == 52
    assert known.table[schema.LABELS].null_count == 2
    assert read_truth(archive, ALL_IMAGES, "all", []).table.num_rows == 62


def test_only_the_evaluated_split_is_read(archive: str) -> None:
    (Path(archive) / "val" / "part-00000.parquet").unlink()
    assert read_truth(archive, ALL_IMAGES, "test", []).table.num_rows == 52
    with pytest.raises(storage.NotFoundError):
        read_truth(archive, ALL_IMAGES, "all", [])


def test_combined_archives_are_evaluated_only_if_ids_are_unique(archive: str, tmp_path: Path) -> None:
    other = write_archive(tmp_path / "other", images=12, rejects=0)
    join_shards(str(tmp_path / "both"), [archive, other], ["/a", "/b"])
    run = write_run(tmp_path / "run", named(guesses(60)), archive=archive)
    assert "got 12 ids in common" in mistake(run, tmp_path / "out", archive=str(tmp_path / "both"))


def test_a_run_lies_where_scoring_puts_it(archive: str, tmp_path: Path) -> None:
    assert SCORES == plan.SCORES
    run = read_run(write_run(tmp_path / "run", named(guesses(60)), archive=archive))
    assert (run.family, run.archive) == ("aecnn", archive)


def mistake(run: str, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        reports.report(run, ReportOptions(**{"resamples": 20, **options}), str(out))
    return str(raised.value)


def test_mistakes_raise_errors(archive: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scored = named(guesses(60))
    run = write_run(tmp_path / "run", scored, archive=archive)
    assert "no scoring run" in mistake(str(tmp_path / "nothing"), out)
    strange = write_run(tmp_path / "strange", scored, family="unheard-of")
    assert "'unheard-of', for which there is no report: use a run of family aecnn" in mistake(strange, out)
    assert "no image in split 'train' (test 52, val 10)" in mistake(run, out, split="train")
    strangers = write_run(tmp_path / "strangers", {"a.png": [0.1, 0.2, 0.3]}, archive=archive)
    assert "0 are in" in mistake(strangers, out)
    assert "0 are in" in mistake(run, out, compare_with=strangers)
    others = write_run(tmp_path / "others", dict(list(scored.items())[-5:]), archive=archive)
    rest = write_run(tmp_path / "rest", dict(list(scored.items())[:-5]), archive=archive)
    assert "no scored images or findings in common" in mistake(rest, out, compare_with=others)
    fracture = write_run(tmp_path / "fracture", {i: [0.5] for i in scored}, ("Fracture",), archive=archive)
    assert "the scored findings are Fracture, the labeled ones Mass, Edema, Hernia" in mistake(fracture, out)
    narrow = write_run(tmp_path / "narrow", {i: [0.5] for i in scored}, archive=archive)
    assert "expected 3 values per image, one for each finding, got [1]" in mistake(narrow, out)
    assert "expected --resamples of 1 or more, got 0" in mistake(run, out, resamples=0)
    twice = write_run(tmp_path / "twice", scored, archive=archive)
    part = tmp_path / "twice" / SCORES / "part-00000.parquet"
    rows = pq.read_table(part)
    pq.write_table(pa.concat_tables([rows, rows]), part)
    assert "expected each image once" in mistake(twice, out)
    pq.write_table(rows.replace_schema_metadata(), part)
    assert "got several or none: score" in mistake(twice, out)
    pq.write_table(pq.read_table(part).drop_columns([schema.DECISIONS]), part)
    assert "no column decisions" in mistake(twice, out)


def test_evaluate_writes_the_metrics_and_tables_of_the_report_alone(archive: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", named(guesses(60)), archive=archive)
    other = write_run(tmp_path / "other", named(guesses(60)), archive=archive)
    chosen = ReportOptions(resamples=20, compare_with=other)
    reported = report_command.main(report_command.Options(run=(run,), out=str(tmp_path / "report"), report=chosen))
    out = tmp_path / "out"
    result = evaluate.main(evaluate.Options(run=run, out=str(out), report=chosen))
    assert result == {
        "metrics": reported["metrics"],
        "tables": [str(out / f"{name}.csv") for name in ("comparison", "findings", "hardest", "operating_points")],
    }
    assert {str(path) for path in out.iterdir()} == {*result["tables"]}
    assert (out / "findings.csv").read_text() == (tmp_path / "report" / "findings.csv").read_text()


def test_evaluate_needs_images_with_ground_truth(archive: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", named(guesses(60)), archive=archive)
    with pytest.raises(UserError, match="no image in split 'train'"):
        evaluate.main(evaluate.Options(run=run, out=str(tmp_path / "out"), report=ReportOptions(split="train")))
    assert not (tmp_path / "out").exists()
