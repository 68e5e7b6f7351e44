"""Several runs, or the checkpoints of one run, share a page: each has a part, and key figures are side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation import ground_truth, reports
from cxr.evaluation.run import ReportOptions
from cxr.sources.manifest import Manifest
from tests.scored_runs import IMAGES, labeled_shards, write_panel, write_run

OPTIONS = ReportOptions(resamples=10)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return labeled_shards(tmp_path / "shards")


@pytest.mark.slow
def test_runs_side_by_side_have_the_metrics_that_each_has_alone(archive: str, tmp_path: Path) -> None:
    runs = {name: write_run(tmp_path / name, archive, signal) for name, signal in (("a", 0.3), ("b", 0.1))}
    together = reports.report([f"new={runs['a']}", runs["b"]], OPTIONS, str(tmp_path / "out"))
    for name, uri in (("new", runs["a"]), ("b", runs["b"])):
        alone = reports.report(uri, OPTIONS, str(tmp_path / "alone"))["metrics"]
        assert {key: together["metrics"][f"{name}/{key}"] for key in alone} == alone
        assert Path(together["parts"][name]["findings"]).parent == tmp_path / "out" / name
    text = Path(together["report"]).read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Side by side", "## new: findings", "## b: findings", "## About new", "## About b"]
    assert "pictures/side_by_side.png" in text
    assert all(Path(uri).exists() for uri in together["pictures"])
    with pytest.raises(UserError, match="two named a: use --run NAME=URI"):
        reports.report([runs["a"], f"a={runs['b']}"], OPTIONS, str(tmp_path / "out"))


@pytest.mark.slow
def test_every_checkpoint_of_a_panel_has_a_part(archive: str, tmp_path: Path) -> None:
    """Without masks in the archive, the part about masks describes the predictions."""
    run = write_panel(tmp_path / "panel", archive)
    metrics = reports.report(run, OPTIONS, str(tmp_path / "out"))["metrics"]
    for name, signal in (("strong", 0.3), ("weak", 0.1)):
        alone = reports.report(write_run(tmp_path / name, archive, signal), OPTIONS, str(tmp_path / "alone"))[
            "metrics"
        ]
        assert {key: metrics[f"{name}/{key}"] for key in alone} == alone
    assert metrics["masks/images_with_mask"] == IMAGES
    named = replace(OPTIONS, archive=archive)  # also where the ground truth of some checkpoints is given
    assert reports.report(run, named, str(tmp_path / "out"))["metrics"] == metrics
    page = (tmp_path / "out/report.html").read_text()
    assert f'data-metric="strong/mean_auroc" data-value="{metrics["strong/mean_auroc"]}"' in page
    assert page.count("Images without scores, and the gate</h2>") == 1


def test_one_checkpoint_of_a_panel_can_be_reported_and_compared(archive: str, tmp_path: Path) -> None:
    run = write_panel(tmp_path / "panel", archive)
    other_run = write_run(tmp_path / "weak", archive, 0.1)
    chosen = ReportOptions(resamples=10, member="strong", compare_with=other_run)
    metrics = reports.report(run, chosen, str(tmp_path / "out"))["metrics"]
    assert metrics["mean_auroc_gain"] > 0
    same = reports.report(run, ReportOptions(resamples=10, member="strong", compare_with=run), str(tmp_path / "out"))
    assert same["metrics"]["mean_auroc_gain"] == 0, "with the checkpoint of the same name"
    with pytest.raises(UserError, match="expected --member to be one of strong, weak, masks, got other"):
        reports.report(run, ReportOptions(member="other"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="name one with --member: strong, weak, masks"):
        reports.evaluate(run, OPTIONS, str(tmp_path / "out"))


def test_the_lists_of_an_archive_are_read_once_for_all_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_manifest = [], ground_truth.open_manifest

    def counted(archive: str, *options: Any) -> Manifest:
        opened.append(archive)
        return replace(open_manifest(archive, *options), notes=["a note"])

    monkeypatch.setattr(ground_truth, "open_manifest", counted)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/a.png").write_bytes(b"")
    monkeypatch.setattr(
        reports,
        "_content",
        lambda run, options, out: ground_truth.read_truth(run.archive, options.reading, "all", [schema.LABELS]),
    )
    read: list[Manifest] = []
    monkeypatch.setattr(reports, "several_runs", lambda contents, out: read.extend(contents.values()))
    run = write_panel(tmp_path / "panel", str(tmp_path / "archive"))
    for times in (1, 2):
        with pytest.raises(TypeError):  # there is no report to write
            reports.report(run, OPTIONS, str(tmp_path / "out"))
        assert len(opened) == times
    assert [manifest.table.num_rows for manifest in read] == [1] * 6
    assert [manifest.notes for manifest in read] == [["a note"], [], []] * 2
