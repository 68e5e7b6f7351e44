"""Scoring runs as `cxr score` writes them, of one checkpoint and of several, without scoring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.sources import rle
from tests.made_shards import write_shards
from tests.written_runs import write_scored

IMAGES, SIDE, FINDINGS = 30, 16, ("Mass", "Edema")
LABELS = (np.random.default_rng(0).random((IMAGES, 2)) < 0.5).astype(np.int8)
CLASSES = pa.schema([(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))])


def labeled_shards(folder: Path) -> str:
    """Shards with labels, without masks."""
    known = [{schema.LABELS: row} for row in LABELS.tolist()]
    return write_shards(folder, {"test": IMAGES}, size=SIDE, findings=FINDINGS, known=lambda _, n: known[n])


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


def _write(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], fields: pa.Schema) -> str:
    size = {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE}
    same = [{schema.IMAGE_ID: f"test-{number:04d}.png"} | size for number in range(IMAGES)]
    rows = [one | row for one, row in zip(same, rows, strict=True)]
    columns = pa.schema([*schema.SCORES, *fields], metadata=fields.metadata)
    return write_scored(folder, settings, pa.Table.from_pylist(rows, columns))


def write_run(folder: Path, archive: str, signal: float) -> str:
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "classify"}}
    fields = CLASSES.with_metadata({schema.FINDINGS_KEY: json.dumps(FINDINGS)})
    return _write(folder, settings, classified(signal), fields)


def write_panel(folder: Path, archive: str) -> str:
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
    return _write(folder, settings, rows, pa.schema(fields, {schema.MEMBERS_KEY: json.dumps(records)}))
