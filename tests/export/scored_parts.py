"""Parts of scores made by hand, as `cxr score` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cxr import schema
from cxr.families import recipe_type
from cxr.inference.panel import join_scores
from tests.written_runs import write_scored

FINDINGS = ("Mass", "Nodule")


def part(family: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A part of scores; columns that a row lacks are null."""
    metadata = {schema.FINDINGS_KEY: json.dumps(FINDINGS)}
    return pa.Table.from_pylist(list(rows), pa.schema([*schema.SCORES, *recipe_type(family).score_columns], metadata))


def image(name: str, **values: Any) -> dict[str, Any]:
    """An image of 40 x 30 pixels."""
    known = {schema.IMAGE_ID: name, schema.SPLIT: "test", schema.WIDTH_PX: 40, schema.HEIGHT_PX: 30}
    return known | {schema.SOURCE_URI: f"/archive/{name}"} | values


def probabilities(*values: float) -> dict[str, Any]:
    """The scores of a classifier with the threshold .5; NaN is an untrained finding."""
    decisions = [-1 if value != value else int(value >= 0.5) for value in values]
    return {schema.PROBABILITIES: list(values), schema.DECISIONS: decisions}


def box(label: str, score: float, *xyxy: float) -> dict[str, Any]:
    edges = zip((schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX), xyxy, strict=True)
    return {schema.LABEL: label, schema.SCORE: score, **dict(edges)}


def write_panel_run(out: Path, members: Mapping[str, pa.Table]) -> str:
    """A run of several checkpoints over /archive, from a part of each."""
    records = {name: {"name": name, "findings": FINDINGS} for name in members}
    parts = {
        name: table.replace_schema_metadata({schema.MEMBERS_KEY: json.dumps([records[name]])})
        for name, table in members.items()
    }
    about = {
        name: {
            "checkpoint_sha256": "0" * 64,
            "recipe": {"family": "detect" if schema.PRED_BOXES in table.column_names else "classify"},
        }
        for name, table in members.items()
    }
    settings = {"archive": "/archive", "panel": [*members], "members": about}
    return write_scored(out, settings, join_scores(parts))


def write_run(out: Path, family: str, parts: Sequence[Sequence[dict[str, Any]]]) -> str:
    """A run of one checkpoint over /archive."""
    settings = {"archive": "/archive", "checkpoint_sha256": "0" * 64, "recipe": {"family": family}}
    return write_scored(out, settings, *(part(family, rows) for rows in parts))
