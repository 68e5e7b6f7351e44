"""Reports on runs with pseudonyms: with the crosswalk as any other, without it a description of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.cli.commands import export_kaggle_siim
from cxr.data.identity import Identity, open_identity
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.run import ReportOptions
from cxr.families import recipe_type
from cxr.phantom.archive import write_phantom
from cxr.sources import open_manifest
from tests.written_runs import write_scored

IMAGES, SIDE = 40, 64


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("xrays"))
    write_phantom(folder, IMAGES, size=SIDE)
    return folder


def write_run(out: Path, archive: str, identity: Identity | None) -> str:
    """What `cxr score` writes for a classifier."""
    manifest = open_manifest(archive)
    rng = np.random.default_rng(0)
    rows = manifest.table.select([n for n in schema.SCORES.names if n in schema.MANIFEST.names]).to_pylist()
    for row in rows:
        p = rng.uniform(0, 1, len(manifest.findings))
        row |= {schema.PROBABILITIES: p.tolist(), schema.DECISIONS: (p > 0.5).astype(int).tolist()}
        row |= {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE}
    rows[0] |= {schema.PROBABILITIES: None, schema.DECISIONS: None, schema.ERROR: "blank"}
    fields = pa.schema(
        [*schema.SCORES, *recipe_type("classify").score_columns], {schema.FINDINGS_KEY: json.dumps(manifest.findings)}
    )
    table = pa.Table.from_pylist(rows, fields)
    settings = {"archive": archive, "checkpoint_sha256": "0" * 64, "recipe": {"family": "classify"}}
    if identity:
        identity.record(table)
        table = identity.applied(table)
        settings["pseudonyms"] = identity.key_name
    return write_scored(out, settings, table)


def named(folder: Path, archive: str) -> list[tuple[Path, str]]:
    """The images of an archive that files name."""
    ids = open_manifest(archive).table[schema.IMAGE_ID].to_pylist()
    written = {path: path.read_text("latin-1") for path in folder.rglob("*") if path.is_file()}
    return [(path, name) for path, text in written.items() for name in ids if name in text]


def without_intervals(result: dict[str, Any]) -> dict[str, float]:
    """The metrics, but not intervals of the bootstrap, in which patients are drawn in the order of their ids."""
    return {name: value for name, value in result["metrics"].items() if not name.endswith(("_low", "_high"))}


@pytest.fixture
def identity(tmp_path: Path, archive: str) -> Identity:
    storage.write_bytes(str(tmp_path / "secret" / "key.txt"), b"a secret of at least sixteen bytes")
    made = open_identity(str(tmp_path / "secret" / "key.txt"), "", str(tmp_path / "run"), [archive])
    assert made is not None
    return made


OPTIONS = {"split": "all", "resamples": 20}


@pytest.mark.slow
def test_with_the_crosswalk_the_metrics_are_those_of_the_run_with_ids(
    archive: str, identity: Identity, tmp_path: Path
) -> None:
    with_ids = write_run(tmp_path / "with_ids", archive, None)
    run = write_run(tmp_path / "run", archive, identity)
    expected = reports.report(with_ids, ReportOptions(**OPTIONS), str(tmp_path / "report_with_ids"))
    options = ReportOptions(**OPTIONS, crosswalk=identity.crosswalk)
    result = reports.report(run, options, str(tmp_path / "report"))
    assert without_intervals(result) == without_intervals(expected)
    assert named(tmp_path / "report_with_ids", archive)
    assert named(tmp_path / "report", archive) == []


def test_without_the_crosswalk_the_report_only_describes_the_scores(
    archive: str, identity: Identity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run(tmp_path / "run", archive, identity), str(tmp_path / "report")
    result = reports.report(run, ReportOptions(**OPTIONS), out)
    assert "has pseudonyms, so the report only describes the scores" in capsys.readouterr().out
    assert result["metrics"]["images"] == IMAGES
    assert not any("auroc" in name for name in result["metrics"])
    with pytest.raises(UserError, match="ids: use its crosswalk"):
        reports.report(run, ReportOptions(**OPTIONS, archive=archive), out)
    with pytest.raises(UserError, match="ids: use its crosswalk"):
        reports.evaluate(run, ReportOptions(**OPTIONS), out)


def test_a_crosswalk_for_a_run_with_ids_is_refused(archive: str, identity: Identity, tmp_path: Path) -> None:
    with_ids = write_run(tmp_path / "with_ids", archive, None)
    with pytest.raises(UserError, match="not pseudonyms: omit --crosswalk"):
        reports.report(with_ids, ReportOptions(crosswalk=identity.crosswalk), str(tmp_path / "report"))


def test_submissions_need_the_names_of_the_archive(archive: str, identity: Identity, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", archive, identity)
    with pytest.raises(UserError, match="has pseudonyms, but a submission needs the archive's own names"):
        export_kaggle_siim.main(export_kaggle_siim.Options(run=run, out=str(tmp_path / "out")))
