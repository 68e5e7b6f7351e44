"""Several runs, or the checkpoints of one run, share a page: each has a part, and key figures are side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.run import SCORES, ReportOptions
from cxr.sources import rle
from tests.made_shards import write_shards

IMAGES, SIDE, FINDINGS = 30, 16, ("Mass", "Edema")
LABELS = (np.random.default_rng(0).random((IMAGES, 2)) < 0.5).astype(np.int8)
CLASSES = pa.schema([(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))])
OPTIONS = ReportOptions(resamples=10)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    """Shards with labels, without masks."""
    known = [{schema.LABELS: row} for row in LABELS.tolist()]
    return write_shards(
        tmp_path / "shards", {"test": IMAGES}, size=SIDE, findings=FINDINGS, known=lambda _, number: known[number]
    )


def classified(signal: float) -> list[dict[str, Any]]:
    p = np.random.default_rng(1).uniform(0.1, 0.6, (IMAGES, 2)) + signal * LABELS
    decisions = (p >= 0.4).astype(int).tolist()
    return [
        {schema.PROBABILITIES: row, schema.DECISIONS: own} for row, own in zip(p.tolist(), decisions, strict=True)
    ]


def segmented() -> list[dict[str, Any]]:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:8, 4:8] = True
    values: dict[str, Any] = {schema.PRED_MASK_RLE: rle.encode(mask), schema.PRED_MASK_AREA_PX: 16}
    values |= {schema.RESIZE_TRANSFORM: {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}}
    return [values | {schema.PRED_MASK_PROBABILITY: float("nan")}] * IMAGES


def write(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], fields: pa.Schema) -> str:
    storage.write_json(str(folder / "ledger.json"), {"settings": settings, "fingerprint": ""})
    size = {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE}
    same = [{schema.IMAGE_ID: f"test-{number:04d}.png"} | size for number in range(IMAGES)]
    rows = [one | row for one, row in zip(same, rows, strict=True)]
    columns = pa.schema([*schema.SCORES, *fields], metadata=fields.metadata)
    (folder / SCORES).mkdir()
    pq.write_table(pa.Table.from_pylist(rows, columns), folder / SCORES / "part-00000.parquet")
    return str(folder)


def single(folder: Path, archive: str, signal: float) -> str:
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "classify"}}
    fields = CLASSES.with_metadata({schema.FINDINGS_KEY: json.dumps(FINDINGS)})
    return write(folder, settings, classified(signal), fields)


def panel(folder: Path, archive: str) -> str:
    """A run of two classifiers and a segmentation network."""
    members = {"strong": "classify", "weak": "classify", "masks": "lungs"}
    described = {name: {"recipe": {"family": family}, "checkpoint_sha256": "0"} for name, family in members.items()}
    settings = {"archive": archive, "panel": list(members), "members": described}
    records = [
        {"name": name, "family": family, "checkpoint": name, "sha256": "0"}
        | {"findings": list(FINDINGS) if family == "classify" else []}
        for name, family in members.items()
    ]
    scores = {"strong": classified(0.3), "weak": classified(0.1), "masks": segmented()}
    rows = [
        {f"{name}/{column}": value for name, of in scores.items() for column, value in of[number].items()}
        for number in range(IMAGES)
    ]
    fields = [
        pa.field(f"{name}/{field.name}", field.type)
        for name, family in members.items()
        for field in (
            *(CLASSES if family == "classify" else schema.MASK_SCORES),
            schema.SCORES.field(schema.RESIZE_TRANSFORM),
        )
    ]
    return write(folder, settings, rows, pa.schema(fields, {schema.MEMBERS_KEY: json.dumps(records)}))


def test_runs_side_by_side_have_the_metrics_that_each_has_alone(archive: str, tmp_path: Path) -> None:
    runs = {name: single(tmp_path / name, archive, signal) for name, signal in (("a", 0.3), ("b", 0.1))}
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
    with pytest.raises(UserError, match="two named a: give --run NAME=URI"):
        reports.report([runs["a"], f"a={runs['b']}"], OPTIONS, str(tmp_path / "out"))


def test_every_checkpoint_of_a_panel_has_a_part(archive: str, tmp_path: Path) -> None:
    """Without masks in the archive, the part about masks describes the predictions."""
    run = panel(tmp_path / "panel", archive)
    metrics = reports.report(run, OPTIONS, str(tmp_path / "out"))["metrics"]
    for name, signal in (("strong", 0.3), ("weak", 0.1)):
        alone = reports.report(single(tmp_path / name, archive, signal), OPTIONS, str(tmp_path / "alone"))["metrics"]
        assert {key: metrics[f"{name}/{key}"] for key in alone} == alone
    assert metrics["masks/images_with_mask"] == IMAGES
    page = (tmp_path / "out/report.html").read_text()
    assert f'data-metric="strong/mean_auroc" data-value="{metrics["strong/mean_auroc"]}"' in page
    assert page.count("Images without scores, and the gate</h2>") == 1


def test_one_checkpoint_of_a_panel_can_be_reported_and_compared(archive: str, tmp_path: Path) -> None:
    run = panel(tmp_path / "panel", archive)
    against = single(tmp_path / "weak", archive, 0.1)
    chosen = ReportOptions(resamples=10, member="strong", against=against)
    metrics = reports.report(run, chosen, str(tmp_path / "out"))["metrics"]
    assert metrics["mean_auroc_gain"] > 0
    same = reports.report(run, ReportOptions(resamples=10, member="strong", against=run), str(tmp_path / "out"))
    assert same["metrics"]["mean_auroc_gain"] == 0, "with the checkpoint of the same name"
    with pytest.raises(UserError, match="expected --member among strong, weak, masks, got other"):
        reports.report(run, ReportOptions(member="other"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="name one with --member: strong, weak, masks"):
        reports.evaluate(run, OPTIONS, str(tmp_path / "out"))
