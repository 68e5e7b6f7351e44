"""Code that the studies share: scoring test images with the trained networks, and their record in result.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cxr.cli.training_jobs import training_record
from cxr.evaluation.run import Run, read_run
from cxr.families.base import Recipe
from cxr.inference.options import ScoreOptions
from cxr.inference.score import score
from cxr.training.sweep import Trained


def scored(network: Trained, data: str) -> Run:
    """The scores of the test images of shards by a network of the study, in `scored` beside its checkpoint. The
    cluster makes them once."""
    out = f"{network.checkpoint.removesuffix('/checkpoint')}/scored"
    score(data, network.checkpoint, out, ScoreOptions(split="test", max_rejects=0))
    return read_run(out)


def networks_record(trained: Sequence[Trained], recipes: Mapping[str, Recipe], data: str) -> dict[str, Any]:
    """For result.json: checkpoints by name and seed, the shards, and each recipe with its initial weights."""
    return {
        "checkpoints": {f"{network.name}, seed {network.seed}": network.checkpoint for network in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
    }
