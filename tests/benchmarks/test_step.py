"""Figures of a training step: operations, utilization and ratios."""

from __future__ import annotations

import pytest
import torch

from cxr import schema
from cxr.benchmarks.throughput.step import Step, operations, peak
from cxr.families.aecnn import AecnnRecipe


def test_operations_grow_with_image_size_and_trained_parts() -> None:
    recipe = AecnnRecipe(size=32, patch=16, width=8, backbone="resnet18", stem_stride=1, first_stage="joint")
    small, large = (operations(recipe.replace(size=size), schema.FINDINGS) for size in (32, 64))
    assert large == pytest.approx(4 * small, rel=0.05)
    codec = operations(
        recipe.replace(first_stage="autoencoder", last_stage="autoencoder", patch=32, patches=1), schema.FINDINGS
    )
    assert 0 < codec < small


def test_ratios() -> None:
    step = Step("float32", images_per_s=90, bare_images_per_s=100, gflop_per_image=2, peak_gflops=360)
    assert (step.ratio_to_bare_loop, step.mfu) == (0.9, 0.5)
    assert step.metrics()["float32/mfu"] == 0.5


def test_peak_is_measured() -> None:
    assert 0.1 < peak("float32", torch.device("cpu"), 0.05) < 1e5
