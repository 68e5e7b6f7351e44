"""The sections that end every report: images without scores, the gate, and how the run was made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data.run_ledger import read_ledger
from cxr.evaluation.run import Content, Run, checkpoint_uri, read_scores
from cxr.reporting.page import Block, Details, Section
from cxr.reporting.score_summary import share
from cxr.reporting.tables import Table, csv_text
from cxr.wording import counted

RESULT_FILE, REJECTS_FILE = "result.json", "rejects.csv"
_NOT_CHECKED = "not checked"
_COUNTS = ("new", "changed", "unchanged", "removed")  # of images in a pass


def unscored_section(run: Run, out: str, result: dict[str, Any]) -> Section:
    """How many of a run's images have no scores, why, and what the gate said; OUT/rejects.csv names the images."""
    parts = read_scores(run, [schema.IMAGE_ID, schema.ERROR], optional=[schema.GATE])
    table = pa.concat_tables(part.replace_schema_metadata() for part in parts).sort_by(schema.IMAGE_ID)
    failed = table.filter(pc.is_valid(table[schema.ERROR])).select([schema.IMAGE_ID, schema.ERROR])
    reasons = Counter(failed[schema.ERROR].to_pylist())
    scored = table.num_rows - failed.num_rows
    blocks: list[Block] = [
        f"{scored:,} of {counted(table.num_rows, 'image')} of the run have scores. The others are left out of all "
        f"figures above."
    ]
    if failed.num_rows:
        result["rejects"] = storage.join(out, REJECTS_FILE)
        storage.write_text(result["rejects"], csv_text(failed.to_pylist()))
        rows = [[reason, f"{count:,}", share(count, table.num_rows)] for reason, count in reasons.most_common()]
        blocks += [Table(["reason", "images", "share"], rows), f"`{REJECTS_FILE}` names each image."]
    gate = Counter(name or _NOT_CHECKED for name in table[schema.GATE].to_pylist())
    if set(gate) - {_NOT_CHECKED}:
        rows = [[name, f"{count:,}", share(count, table.num_rows)] for name, count in gate.most_common()]
        blocks += [
            "The gate checks that each image is an upright frontal chest X-ray that is not inverted. Scores of other "
            "images are meaningless.",
            Table(["result of the gate", "images", "share"], rows),
        ]
    return Section("Images without scores, and the gate", blocks)


def about_section(contents: Sequence[Content], title: str) -> Section:
    """Where the report's figures come from: the run, its checkpoints, options, versions and speed.

    Args:
        contents: of the checkpoints of one run.
    """
    content = contents[0]
    run, options = content.run, content.options
    made = _json(storage.join(run.uri, RESULT_FILE))
    ledger = read_ledger(run.uri)
    generation = ledger.readable or ledger.latest
    facts = {
        "scores": run.uri,
        "note": run.note,
        "scored archive": ", ".join(run.archives),
        "ground truth": ", ".join(dict.fromkeys(each.archive or "none" for each in contents)),
    }
    if any(each.archive for each in contents):
        facts |= {name.replace("_", " "): str(value) for name, value in options.labeling.describe().items()}
    facts |= {
        "split": options.split,
        "selected images": run.select,
        "bootstrap": f"{counted(options.resamples, 'resample')} of patients, seed {options.seed}",
        "throughput of the last pass": f"{speed:,.1f} images/s" if (speed := made.get("images_per_s")) else "",
        "duration of the last job": f"{made['seconds']:,.0f} s" if "seconds" in made else "",
        "versions": ", ".join(f"{name} {number}" for name, number in made.get("versions", {}).items()),
        "commit": made.get("commit", ""),
    }
    models = [
        [each.run.member or each.run.family, each.run.family, checkpoint_uri(each.run), each.run.checkpoint_sha256]
        for each in contents
    ]
    blocks: list[Block] = [
        Table(["", ""], [[name, fact] for name, fact in facts.items() if fact]),
        Table(["model", "family", "checkpoint", "SHA-256"], models, "Models"),
    ]
    if generation and (passes := [each for each in generation.increments if each.committed]):
        counts = [[f"{getattr(each, name):,}" for name in (*_COUNTS, "rejects")] for each in passes]
        rows = [[each.committed, *numbers] for each, numbers in zip(passes, counts, strict=True)]
        caption = "Passes over the archive: each scored the images that were new or had changed"
        blocks.append(Table(["finished", *_COUNTS, "without scores"], rows, caption))
    settings = _flat(made.get("settings", {})) or _flat(generation.settings if generation else {})
    if settings:
        table = Table(["option", "value"], [[name, value] for name, value in settings.items()])
        blocks.append(Details("All options of the scoring run", [table]))
    return Section(title, blocks)


def _json(uri: str) -> dict[str, Any]:
    return storage.read_json(uri) if storage.exists(uri) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings within settings, as "score.batch_size"; empty ones are left out."""
    values: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], False):
            values[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return values
