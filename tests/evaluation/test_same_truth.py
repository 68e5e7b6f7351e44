"""Training and reports use the same ground-truth boxes: predicting exactly these has an average precision of 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.boxes.from_heatmaps import MapBoxes
from cxr.data.batch import to_columns
from cxr.data.decode import make_rows
from cxr.data.shards import ARCHIVE_FILE, KIND, REJECTS_FILE
from cxr.evaluation import detection, reports
from cxr.evaluation.run import ReportOptions
from cxr.families import box_scores
from cxr.families.base import ScoringContext
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.labeling import one_reader
from tests.written_runs import write_scored

PIXELS = PixelFormat(64)
WIDE, HIGH = 96, 60  # of the files
ODD = {  # corners in pixels of 1024 x 1024
    "inside": (100, 200, 400, 500),
    "flat": (10, 10, 10, 60),
    "inverted": (300, 300, 200, 200),
    "no number": (np.nan, 1, 2, 3),
    "cut off": (900, 900, 1100, 1140),
    "outside": (1100, 10, 1200, 50),
    "at the border": (-0.2, 0, 512, 1024.4),
}


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (HIGH, WIDE), np.uint8)
        assert cv2.imwrite(str(folder / f"{name}.png"), pixels)


@pytest.fixture
def chestxray14(tmp_path: Path) -> str:
    """An odd box an image; all masses are boxed, but the other finding of the first image is not."""
    names = [f"0000000{number}_000" for number in range(len(ODD))]
    write_images(tmp_path / "nih" / "images", names)
    entries = [f"{name}.png,{'Mass|Effusion' if not n else 'Mass'},{n},PA" for n, name in enumerate(names)]
    lines = ["Image Index,Finding Labels,Patient ID,View Position", *entries]
    (tmp_path / "nih" / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    boxes = [(name, *c[:2], c[2] - c[0], c[3] - c[1]) for name, c in zip(names, ODD.values(), strict=True)]
    listed = [f"{name}.png,Mass,{x},{y},{w},{h},,," for name, x, y, w, h in boxes]
    (tmp_path / "nih" / "BBox_List_2017.csv").write_text(
        "\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *listed])
    )
    return str(tmp_path / "nih")


@pytest.fixture
def vindr(tmp_path: Path) -> str:
    """The same boxes, each drawn by three readers in an original of 1024 x 1024, with copies of another shape."""
    names = [f"image{number}" for number in range(len(ODD))]
    write_images(tmp_path / "vin" / "train", names)
    rows = [
        f"{name},Nodule/Mass,8,R{reader},{','.join('' if edge != edge else str(edge + reader) for edge in corners)}"
        for name, corners in zip(names, ODD.values(), strict=True)
        for reader in range(3)
    ]
    rows += [f"image0,ILD,5,R1,{5},{5},{5},{5}"]
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    (tmp_path / "vin" / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "vin" / "train_meta.csv").write_text(
        "\n".join(["image_id,dim0,dim1", *(f"{n},1024,1024" for n in names)])
    )
    return str(tmp_path / "vin")


def ingested(archive: str) -> tuple[pa.Table, tuple[str, ...]]:
    """Rows as ingest stores them."""
    manifest = one_reader(open_manifest(archive), "wbf")
    return make_rows(manifest.table, PIXELS, threads=1), manifest.findings


def taught(rows: pa.Table, findings: tuple[str, ...]) -> list[MapBoxes]:
    """The boxes that a batch holds, as a detector's predictions."""
    columns = to_columns(rows, [schema.BOXES], PIXELS, findings=findings)[schema.BOXES].astype(np.float64)
    listed = [of[~np.isnan(of[:, 0])] for of in columns]
    return [MapBoxes(of[:, 0].astype(int), of[:, 1:], np.full(len(of), 0.9)) for of in listed]


def write_run(folder: Path, archive: str, rows: pa.Table, findings: tuple[str, ...], found: list[MapBoxes]) -> str:
    column = box_scores.to_box_column(found, rows, ScoringContext(findings, PIXELS.size))
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "detect"}}
    table = pa.table({f.name: rows[f.name] for f in schema.SCORES} | {schema.PRED_BOXES: column})
    metadata = {schema.FINDINGS_KEY: json.dumps(findings)}
    return write_scored(folder, settings, table.replace_schema_metadata(metadata))


def write_shards(folder: Path, archive: str, rows: pa.Table, findings: tuple[str, ...]) -> str:
    folder.mkdir()
    pq.write_table(rows, folder / "rows.parquet")
    pq.write_table(schema.REJECTS.empty_table(), folder / REJECTS_FILE)
    about = {"kind": KIND, "version": 1, "source": "made", "archive": archive, "findings": findings, "rejects": 0}
    about |= {"pixels": {"size": PIXELS.size, "bits": 8}, "row_group_rows": rows.num_rows}
    storage.write_json(
        f"{folder}/{ARCHIVE_FILE}", about | {"parts": {"all": [{"path": "rows.parquet", "rows": rows.num_rows}]}}
    )
    return str(folder)


@pytest.mark.parametrize("layout", ["chestxray14", "vindr"])
def test_a_perfect_network_has_an_average_precision_of_one(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draws in ("_box_pictures", "_label_pictures"):
        monkeypatch.setattr(detection, draws, lambda *_: [])
    archive = request.getfixturevalue(layout)
    rows, findings = ingested(archive)
    found = taught(rows, findings)
    assert [len(boxes) for boxes in found] == [1, 0, 0, 0, 1, 0, 1]
    run = write_run(tmp_path / "run", archive, rows, findings, found)
    stored = write_shards(tmp_path / "shards", archive, rows, findings)
    results = []
    for truth in (archive, stored):
        options = ReportOptions(archive=truth, split="all", resamples=5)
        metrics: dict[str, Any] = reports.report(run, options, str(tmp_path / "out"))["metrics"]
        assert [metrics[name] for name in ("map_40", "map_50", "map_50_95")] == pytest.approx([1] * 3)
        assert (metrics["ground_truth_boxes"], metrics["predicted_boxes"]) == (3, 3)
        results.append(metrics)
    assert results[0] == results[1]


def test_boxes_of_a_finding_without_true_boxes_in_a_positive_image_are_not_false_positives(
    chestxray14: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image shows an effusion, and masses have no boxes: only a predicted nodule is a false positive."""
    for draws in ("_box_pictures", "_label_pictures"):
        monkeypatch.setattr(detection, draws, lambda *_: [])
    rows, findings = ingested(chestxray14)
    found = taught(rows, findings)
    first = found[0].boxes_N4
    named = [findings.index(finding) for finding in ("Mass", "Effusion", "Nodule")]
    found[0] = MapBoxes(np.array(named), np.concatenate([first] * 3), np.array([0.8, 0.9, 0.95]))
    found[1] = MapBoxes(np.array(named[:1]), first, np.array([0.99]))
    run = write_run(tmp_path / "run", chestxray14, rows, findings, found)
    result = reports.report(run, ReportOptions(split="all", resamples=5), str(tmp_path / "out"))
    assert (result["metrics"]["map_40"], result["metrics"]["predicted_boxes"]) == (1, 4)
    assert "2 predicted boxes of findings unknown in their image not counted" in Path(result["report"]).read_text()
