"""AE-CNN compared with its baselines: means over seeds, intervals by patient, differences; a study's settings."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr.benchmarks.studies import aecnn, classifiers
from cxr.benchmarks.studies.xrays import XRays
from cxr.cli.commands.study_aecnn import Options, main
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores
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
def results() -> list[aecnn.CompressionResult]:
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 2, (40, 2)).astype(np.int8), np.repeat(np.arange(20), 2)
    sample = XRays(rng.integers(0, 255, (8, 64, 64)).astype(np.uint8), labels[:8], FINDINGS, patients[:8].astype(str))

    def scores(noise: float) -> LabeledScores:
        values = 1 / (1 + np.exp(-(labels + rng.normal(0, noise, labels.shape))))
        return LabeledScores(FINDINGS, np.arange(40), patients, values, values > 0.5, labels, 0, 0, 0)

    return [
        aecnn.summarize(
            classifiers.result(name, [scores(noise), scores(noise)]),
            [network(kind, 0), network(kind, 1)],
            sample,
        )
        for name, kind, noise in (("uncompressed", "none", 0.5), ("ae-cnn", "residual", 1.0))
    ]


def test_results_have_the_size_and_quality_of_stored_images(results: list[aecnn.CompressionResult]) -> None:
    assert [result.values for result in results] == [64 * 64, 16 * 16]
    assert np.isnan(results[0].psnr)
    assert 5 < results[1].psnr < 30


def test_the_table_and_the_metrics_agree(results: list[aecnn.CompressionResult]) -> None:
    metrics = aecnn.metrics(results)
    assert f"{metrics['ae-cnn/mean_auroc']:.3f}" in aecnn.table(results)
    assert metrics["ae-cnn/gain"] < 0
    assert metrics["ae-cnn/psnr"] == results[1].psnr
    assert "uncompressed/psnr" not in metrics
    assert all(map(np.isfinite, metrics.values()))


def test_the_csv_file_has_the_figures_of_the_table(results: list[aecnn.CompressionResult]) -> None:
    rows = list(csv.DictReader(io.StringIO(aecnn.csv(results))))
    assert [(row["name"], row["finding"]) for row in rows] == [
        (name, finding) for name in ("uncompressed", "ae-cnn") for finding in ("mean", *FINDINGS)
    ]
    compressed = rows[3]
    assert float(compressed["auroc"]) == pytest.approx(aecnn.metrics(results)["ae-cnn/mean_auroc"])
    assert float(compressed["psnr"]) == pytest.approx(results[1].psnr)
    assert compressed["stored_values"] == str(16 * 16)


def test_the_table_has_published_values_beside_those_of_the_same_recipe(
    results: list[aecnn.CompressionResult],
) -> None:
    whole, compressed = aecnn.table(results).splitlines()[2:]
    assert ".8241" in compressed
    assert whole.split("|")[-2].strip() == "–"


def test_the_codec_must_be_one_that_is_trained() -> None:
    with pytest.raises(UserError, match=r"--compressor: expected published or residual, .* got resize"):
        main(Options(recipe=BASE.replace(compressor="resize")))


def test_a_study_compares_one_set_of_settings(tmp_path: Path) -> None:
    _check_same({"a": BASE}, "/data", str(tmp_path))
    _check_same({"a": BASE}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="different settings"):
        _check_same({"a": BASE.replace(epochs=3)}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="archive"):
        _check_same({"a": BASE}, "/other", str(tmp_path))
    _check_same({"a": BASE, "b": BASE.replace(seed=4)}, "/data", str(tmp_path))
    _check_same({"b": BASE.replace(seed=4)}, "/data", str(tmp_path))
    with pytest.raises(UserError, match="b: seed was 4, is 5"):
        _check_same({"b": BASE.replace(seed=5)}, "/data", str(tmp_path))
