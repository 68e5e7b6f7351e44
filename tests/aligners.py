"""Small aligners: one whose scores differ between images, and some that apply the same transform to all."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from cxr import schema
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.models.spatial_transformer import MAX_ROTATION, MAX_TRANSLATION


def saved_aligner(folder: Path, seed: int = 1) -> str:
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    torch.manual_seed(seed)
    network = recipe.network(schema.FINDINGS)
    for values in [*network.parameters()][-2:]:  # zero, so that all images would have the same scores
        torch.nn.init.normal_(values, std=0.1)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={})
    return str(folder)


def fixed_aligner(folder: Path, *, turn_deg: float = 0.0, scale: float = 1.0, shift: float = 0.0) -> str:
    """An aligner that applies the same transform to every image; `shift` is to the right, as a fraction of the
    width."""
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False, iterations=1, parameterization="similarity")
    network = recipe.network(())
    bounded = [2 * shift / MAX_TRANSLATION, 0, math.radians(turn_deg) / MAX_ROTATION, math.log2(scale)]
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.atanh(torch.tensor(bounded))
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    return str(folder)
