"""Show the families, presets and sources of this version, or the input, scores and metrics of a checkpoint.

cxr info  # families with their presets, sources, versions

cxr info --json  # the same for programs

cxr info --checkpoint runs/align/checkpoint
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cxr import schema, storage
from cxr.cli.commands import COMMANDS
from cxr.families import ENSEMBLES, RECIPES
from cxr.families.checkpoint_files import CROPPED_BY, read_about
from cxr.families.presets import PRESETS
from cxr.runtime import provenance
from cxr.sources import SOURCES

_CLASSIFIER = (schema.PROBABILITIES, schema.DECISIONS)
_MASKS = (schema.PRED_MASK_RLE, schema.PRED_MASK_AREA_PX, schema.PRED_MASK_PROBABILITY)
# Columns of the scores, as in the recipes' `score_columns`, which are known only to modules that import torch.
SCORE_COLUMNS: Mapping[str, Sequence[str]] = {
    "align": (schema.THETA,),
    "aecnn": _CLASSIFIER,
    "attend": (*_CLASSIFIER, schema.PRED_BOXES),
    "classify": _CLASSIFIER,
    "detect": (schema.PRED_BOXES,),
    "localize": (*_CLASSIFIER, schema.PRED_BOXES),
    "lungs": _MASKS,
    "pneumothorax": _MASKS,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to show."""

    checkpoint: str = ""
    """Folder or URI of a checkpoint to describe. Default: describe this version of cxr."""


def main(options: Options) -> tuple[dict[str, Any], str]:
    """What to show, as JSON and as text."""
    return _checkpoint(options.checkpoint) if options.checkpoint else _version()


def _version() -> tuple[dict[str, Any], str]:
    families = {
        family: {
            "summary": COMMANDS[f"train {family}"].summary,
            "presets": {name: preset.description for name, preset in PRESETS.get(family, {}).items()},
            "score_columns": SCORE_COLUMNS[family],
        }
        for family in RECIPES
    }
    sources = [source.name for source in SOURCES]
    content = {"families": families, "sources": sources, "versions": provenance.versions()}
    lines = [", ".join(f"{name} {version}" for name, version in content["versions"].items()), ""]
    for family, about in families.items():
        lines += [family, *_indented(about["summary"])]
        lines += [line for name, said in about["presets"].items() for line in _indented(f"--preset {name}: {said}")]
        lines += _indented(f"Scores: {', '.join(about['score_columns'])}")
    lines += ["", "sources (--source)", *_indented(", ".join(sources))]
    return content, "\n".join(lines)


def _checkpoint(uri: str) -> tuple[dict[str, Any], str]:
    about = read_about(uri := storage.normalize(uri))
    recipe, family = about["recipe"], about["recipe"]["family"]
    members = [member["family"] for member in recipe["members"]] if family in ENSEMBLES else []
    scored = members[0] if members else family
    cropped = {"lung_crop": bool(recipe.get("lung_crop")), "aligned": bool(recipe.get("aligner"))}
    needs = {**about["input"], **(cropped if about.get(CROPPED_BY) else dict.fromkeys(cropped, False))}
    gives = {
        "columns": SCORE_COLUMNS.get(scored, ()),
        "findings": about["findings"],
        "learned": about["learned"],
    }
    content = {
        "checkpoint": uri,
        "family": family,
        **({"members": members} if members else {}),
        "needs": needs,
        "gives": gives,
        **{name: about[name] for name in ("metrics", "versions", "commit", "sha256")},
    }
    kind = f"ensemble of {len(members)} networks of family {members[0]}" if members else f"family {family}"
    lines = [f"{uri}: {kind}, written by cxr {about['versions'].get('cxr', 'of unknown version')}", ""]
    lines += ["input", *_indented("any image or archive that `cxr score` reads; it is converted to:")]
    lines += [f"    {name.replace('_', ' ')}: {value}" for name, value in needs.items()]
    lines += ["scores", *_indented(f"columns: {', '.join(gives['columns'])}")]
    lines += _indented(f"findings: {', '.join(about['findings'])}") if about["findings"] else []
    lines += ["metrics on validation images"] if about["metrics"] else []
    lines += [f"    {name}: {_number(value)}" for name, value in sorted(about["metrics"].items())]
    return content, "\n".join(lines)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
