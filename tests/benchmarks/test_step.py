"""Figures of a training step: operations, utilization and ratios."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from cxr import schema
from cxr.benchmarks.throughput import family_steps
from cxr.benchmarks.throughput.step import Step, operations, peak
from cxr.cli.commands import benchmark_families
from cxr.errors import UserError
from cxr.families import RECIPES, recipe_type
from cxr.families.aecnn import AecnnRecipe
from cxr.families.classify import ClassifyRecipe
from tests.made_shards import write_shards


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


@pytest.mark.slow
def test_steps_of_families_are_measured(tmp_path: Path) -> None:
    families = ("classify", "pneumothorax")
    result = benchmark_families.main(
        benchmark_families.Options(out=str(tmp_path), families=families, seconds=0.05, quick=True)
    )
    metrics = result["metrics"]
    for family in families:
        assert metrics[f"{family}/gflop_per_image"] > 0
        assert 0 < metrics[f"{family}/bfloat16_mfu"] < 1
        assert 0 <= metrics[f"{family}/waited"] < 1
        of = metrics[f"{family}/bare_ms"] / metrics[f"{family}/bfloat16_ms"]
        assert metrics[f"{family}/speedup_over_bare_loop"] == pytest.approx(of)
    assert (result["failed"], result["device"]) == ({}, "one core")
    assert "| pneumothorax | 4     |" in (tmp_path / "steps.md").read_text()
    with pytest.raises(UserError, match=r"--families: expected some of align, .* got clasify"):
        benchmark_families.main(benchmark_families.Options(families=("clasify",)))


def test_batches_come_from_shards(tmp_path: Path) -> None:
    made = write_shards(tmp_path, {"train": 6}, size=32, known=lambda *_: {schema.LABELS: [0] * 14})
    batches, findings = family_steps.stream(ClassifyRecipe(size=32, batch_size=4), made)
    assert [len(batch[schema.PIXELS]) for batch in islice(batches, 3)] == [4, 4, 4]
    assert findings == schema.FINDINGS


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(RECIPES))
def test_every_family_can_be_measured(family: str) -> None:
    recipe = recipe_type(family)(**benchmark_families.QUICK[family])
    step = family_steps.measure(recipe, schema.FINDINGS, torch.device("cpu"), 0.01, None)
    assert min(step.bfloat16_ms, step.float32_ms, step.bare_ms, step.gflop_per_image) > 0
    assert recipe_type(family)(**benchmark_families.FULL[family]).size >= 224
