"""Reports show what a run decided: operating points, thresholds, and the most confident mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.evaluation import reports
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.decisions import FALSE_NEGATIVES, FALSE_POSITIVES, Case, varied, wrong_decisions
from cxr.evaluation.run import SCORES, ReportOptions
from cxr.families.classify import ClassifyRecipe
from cxr.inference.predictor import load
from cxr.phantom.archive import write_phantom
from tests.saved_checkpoint import save_untrained
from tests.written_runs import settings_of, write_scored

OPTIONS = ReportOptions(split="all", resamples=20)
FINDINGS = ("Cardiomegaly", "Effusion")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("archive"))
    write_phantom(uri, 40, size=64, findings=FINDINGS, prevalence=0.6)
    return uri


@pytest.fixture(scope="module")
def run(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `cxr score` writes with an untrained classifier."""
    folder = tmp_path_factory.mktemp("run")
    model = save_untrained(folder / "checkpoint", ClassifyRecipe(size=32), FINDINGS)
    predictor = load(model, device="cpu")
    write_scored(folder, settings_for(archive, predictor.sha256), predictor.predict(archive))
    return folder


def settings_for(archive: str, sha256: str) -> dict[str, Any]:
    return {"archive": archive, "checkpoint_sha256": sha256, "recipe": {"family": "classify"}}


def read_csv(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(uri).read_text().splitlines()))


def made(probabilities: Any, labels: Any, called: Any) -> LabeledScores:
    count = len(labels)
    arrays = {"probabilities": np.array(probabilities), "labels": np.array(labels)}
    return LabeledScores(
        findings=FINDINGS,
        rows=np.arange(count),
        patients=np.arange(count),
        predicted_positive=np.array(called),
        images_with_error=0,
        images_without_score=0,
        images_without_labels=0,
        **arrays,
    )


def test_the_most_confident_mistakes_come_first() -> None:
    scores = made(
        [[0.9, 0.3], [0.8, 0.2], [0.1, 0.4], [0.2, 0.1], [0.7, 0.25]],
        [[0, 1], [0, 0], [1, 0], [1, 1], [-1, -1]],
        [[1, 0], [1, 0], [0, 1], [0, 0], [1, 1]],
    )
    cases = wrong_decisions(scores)
    assert cases[FALSE_POSITIVES] == [Case(0, 0), Case(2, 1), Case(1, 0)]  # two lead their findings; unknown: none
    assert cases[FALSE_NEGATIVES] == [Case(2, 0), Case(3, 1), Case(3, 0), Case(0, 1)]


def test_shown_mistakes_are_of_different_images_and_findings() -> None:
    cases = [Case(0, 0), Case(0, 1), Case(1, 0), Case(2, 0), Case(3, 1)]
    shown = {9}
    assert varied(cases, shown) == [Case(0, 0), Case(1, 0), Case(3, 1)]
    assert shown == {9, 0, 1, 3}


def test_a_report_shows_operating_points_and_mistakes_with_heat_maps(run: Path, tmp_path: Path) -> None:
    result = reports.report(str(run), OPTIONS, str(tmp_path / "out"))
    points = read_csv(result["operating_points"])
    assert len(points) == 3 * len(FINDINGS)
    by_choice = {(row["finding"], row["chosen_by"]): row for row in points}
    for finding in FINDINGS:
        own, sensitive = (by_choice[finding, name] for name in ("this run", "sensitivity of at least 0.95"))
        assert float(sensitive["sensitivity"]) >= 0.95
        assert float(own["sensitivity"]) == pytest.approx(result["metrics"][f"sensitivity/{finding}"])
        youden = by_choice[finding, "Youden's index"]
        both = [float(row["sensitivity"]) + float(row["specificity"]) for row in (own, sensitive)]
        assert float(youden["sensitivity"]) + float(youden["specificity"]) >= max(both) - 1e-9
        counts = [int(own[name]) for name in own if name.endswith(("positives", "negatives"))]
        assert sum(counts) == 40
    names = {Path(uri).stem for uri in result["pictures"]}
    assert {"hardest", "labels_predicted", "separation", "roc"} <= names
    page = Path(result["report"]).read_text()
    assert "heat map" in page
    wrong = read_csv(result["hardest"])
    assert {row["kind"] for row in wrong} <= {"false positive", "false negative"}
    assert all(row["image_id"].endswith(".png") for row in wrong)


def test_a_report_shows_the_thresholds_that_the_run_used(run: Path, archive: str, tmp_path: Path) -> None:
    scores = pq.read_table(run / SCORES / "part-00000.parquet")
    write_scored(tmp_path / "run", settings_of(run) | {"thresholds": {"Effusion": 0.125}}, scores)
    result = reports.report(str(tmp_path / "run"), OPTIONS, str(tmp_path / "out"))
    own = {r["finding"]: r["threshold"] for r in read_csv(result["operating_points"]) if r["chosen_by"] == "this run"}
    assert own["Effusion"] == "0.125"


def test_a_report_without_its_checkpoint_has_no_heat_maps(
    run: Path, archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(run / SCORES / "part-00000.parquet")
    members = json.loads(table.schema.metadata[schema.MEMBERS_KEY])
    members[0]["checkpoint"] = str(tmp_path / "gone")
    metadata = {**table.schema.metadata, schema.MEMBERS_KEY: json.dumps(members)}
    write_scored(tmp_path / "run", settings_for(archive, "0"), table.replace_schema_metadata(metadata))
    result = reports.report(str(tmp_path / "run"), OPTIONS, str(tmp_path / "out"))
    assert "hardest" in {Path(uri).stem for uri in result["pictures"]}
    assert "heat map" not in Path(result["report"]).read_text()
    assert "no heat maps, because the checkpoint cannot be read" in capsys.readouterr().out
