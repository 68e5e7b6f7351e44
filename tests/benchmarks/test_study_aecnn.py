"""AE-CNN beside its baselines: what is told of seeds, patients and differences; a study is of one set of settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cxr.benchmarks.studies import aecnn
from cxr.benchmarks.studies.xrays import XRays
from cxr.errors import UserError
from cxr.families.aecnn import AecnnRecipe
from cxr.families.checkpoint import Checkpoint
from cxr.training.sweep import _check_same

FINDINGS = ("Mass", "Nodule")
BASE = AecnnRecipe(size=64, patch=16, depth=1, width=8, backbone="resnet18", stem_stride=1)


def network(compressor: str, seed: int) -> Checkpoint:
    recipe = BASE.replace(compressor=compressor, seed=seed)
    torch.manual_seed(seed)
    return Checkpoint("/kept", recipe, recipe.network(FINDINGS).eval(), FINDINGS, {"metrics": {"mean_auroc": 0.5}})


@pytest.fixture(scope="module")
def judged() -> list[aecnn.Judged]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 64, 64)).astype(np.uint8)
    labels = rng.integers(0, 2, (40, 2)).astype(np.int8)
    test = XRays(pixels, labels, FINDINGS, np.repeat(np.arange(20), 2).astype(str))
    named = {"ae-cnn": "residual", "uncompressed": "none"}
    return aecnn.variants({name: [network(kind, seed) for seed in (0, 1)] for name, kind in named.items()}, test)


def test_each_recipe_is_told_with_its_seeds_and_patients(judged: list[aecnn.Judged]) -> None:
    one, other = judged
    assert (one.values, other.values) == (16 * 16, 64 * 64)
    assert len(one.aurocs) == 2
    low, high = one.ends()
    assert low < one.mean < high
    assert 5 < one.psnr < 30
    assert np.isnan(other.psnr)
    gain, low, high = aecnn.gained(one, other)
    assert gain == pytest.approx(one.mean - other.mean)
    assert low <= gain <= high


def test_the_table_and_the_metrics_say_the_same(judged: list[aecnn.Judged]) -> None:
    told = aecnn.metrics(judged)
    assert f"{told['ae-cnn_auroc']:.3f}" in aecnn.table(judged)
    assert "uncompressed_psnr" not in told
    assert all(map(np.isfinite, told.values()))
    assert aecnn.picture(judged).axes


def test_a_study_compares_one_set_of_settings(tmp_path: Path) -> None:
    _check_same({"a": BASE}, "/data", str(tmp_path))
    _check_same({"a": BASE}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="other settings"):
        _check_same({"a": BASE.replace(epochs=3)}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="archive"):
        _check_same({"a": BASE}, "/other", str(tmp_path))
    _check_same({"a": BASE, "b": BASE.replace(seed=4)}, "/data", str(tmp_path))
    _check_same({"b": BASE.replace(seed=4)}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="b: seed was 4, is 5"):
        _check_same({"b": BASE.replace(seed=5)}, "/data", str(tmp_path))
