"""Checkpoints of untrained networks, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from cxr.families import checkpoint
from cxr.families.base import Recipe


def save_untrained(folder: Path, recipe: Recipe, findings: tuple[str, ...] = ("Edema",), seed: int = 0) -> str:
    """A checkpoint of this recipe, with random weights that depend on the seed alone; its path."""
    torch.manual_seed(seed)
    task = recipe.task(recipe.network(findings))
    checkpoint.save(folder, recipe, task, task.network.state_dict(), findings=findings, metrics={})
    return str(folder)
