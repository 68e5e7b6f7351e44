"""Small aligners whose scores differ between images."""

from __future__ import annotations

from pathlib import Path

import torch

from cxr import schema
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe


def saved_aligner(folder: Path, seed: int = 1) -> str:
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    torch.manual_seed(seed)
    network = recipe.network(schema.FINDINGS)
    for values in [*network.parameters()][-2:]:  # zero, so that all images would have the same scores
        torch.nn.init.normal_(values, std=0.1)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={})
    return str(folder)
