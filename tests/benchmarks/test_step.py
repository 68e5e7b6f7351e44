"""The figures of a training step: operations counted, shares and ratios."""

from __future__ import annotations

import pytest
import torch

from cxr import schema
from cxr.benchmarks.throughput.step import Step, limit, operations
from cxr.families.aecnn import AecnnRecipe


def test_operations_grow_with_the_image_and_with_what_learns() -> None:
    recipe = AecnnRecipe(size=32, patch=16, width=8, backbone="resnet18", stem_stride=1, first_stage="joint")
    small, large = (operations(recipe.replace(size=size), schema.FINDINGS) for size in (32, 64))
    assert large == pytest.approx(4 * small, rel=0.05)
    codec = operations(
        recipe.replace(first_stage="autoencoder", last_stage="autoencoder", patch=32, patches=1), schema.FINDINGS
    )
    assert 0 < codec < small


def test_ratios() -> None:
    step = Step("float32", images_per_s=90, bare_images_per_s=100, gflop_per_image=2, limit_gflops=360)
    assert (step.over_bare, step.share) == (0.9, 0.5)
    assert step.metrics()["float32/share_of_limit"] == 0.5


def test_the_limit_is_measured() -> None:
    assert 0.1 < limit("float32", torch.device("cpu"), 0.05) < 1e5
