"""The preprocessing study: variants, paired differences, the report, and the job."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.benchmarks.studies import classifiers
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli import study_preprocessing as study
from cxr.cli.commands.study_preprocessing import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabelTruth, known_labels
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.run import Run, read_run
from cxr.families.classify import ClassifyRecipe
from cxr.sources.options import ALL_IMAGES
from tests.benchmarks.axis_labels import least_gap_px
from tests.benchmarks.study_jobs import only_named, without_checks
from tests.made_shards import write_shards
from tests.written_runs import write_scored

IMAGES, FINDINGS = 60, ("Mass", "Nodule", "Hernia")


def known(split: str, number: int) -> Mapping[str, object]:
    """Every second image shows a mass and every third a nodule; hernias do not occur."""
    return {
        schema.PATIENT_ID: f"{split} {number // 2}",
        schema.LABELS: [int(number % 2 == 0), int(number % 3 == 0), 0],
    }


def classifier(folder: Path, noise: float, seed: int) -> Run:
    """The run of a network that knows the labels, with noise."""
    rng = np.random.default_rng(seed)
    columns = ClassifyRecipe.score_columns
    rows = []
    for n in range(IMAGES):
        labels = known("test", n)[schema.LABELS]
        p = np.clip(0.5 + 0.2 * (np.array(labels) - 0.5) + rng.normal(0, noise, 3), 0, 1).tolist()
        rows.append({schema.IMAGE_ID: f"test-{n:04d}.png", schema.PROBABILITIES: p, schema.DECISIONS: labels})
    fields = pa.schema([*schema.SCORES, *columns], {schema.FINDINGS_KEY: json.dumps(FINDINGS)})
    settings = {"archive": "shards", "checkpoint_sha256": "0", "recipe": {"family": "classify"}}
    return read_run(write_scored(folder, settings, pa.Table.from_pylist(rows, fields)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, known=known, findings=FINDINGS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Two seeds each: those with CLAHE see the labels, the others hardly."""
    folder = tmp_path_factory.mktemp("runs")
    noise = {"none": 0.3, "clahe": 0.02}
    return {name: [classifier(folder / f"{name}{k}", of, k) for k in (0, 1)] for name, of in noise.items()}


@pytest.fixture(scope="module")
def results(made: str, runs: dict[str, list[Run]]) -> list[SeedResults]:
    truth = known_labels(read_truth(made, ALL_IMAGES, "test", [schema.PATIENT_ID, schema.LABELS]))
    assert isinstance(truth, LabelTruth)
    joined = classifiers.joined(runs, truth)
    return [classifiers.result(name, of) for name, of in joined.items()]


def test_variants_are_compared_with_none_on_the_same_patients_and_seeds(results: list[SeedResults]) -> None:
    none, clahe = results
    assert none.findings == ("Mass", "Nodule"), "hernias cannot be measured"
    assert clahe.mean().value == pytest.approx(1, abs=0.01)
    gain = clahe.gain(none)
    assert gain.value == pytest.approx(clahe.mean().value - none.mean().value)
    assert 0 < gain.low < gain.value < gain.high
    assert none.gain(none).value == none.gain(none).high == 0


def test_the_table_and_the_csv_file_agree(results: list[SeedResults]) -> None:
    text = classifiers.table(results, "preprocessing")
    rows = list(csv.DictReader(io.StringIO(classifiers.csv(results))))
    assert [row["finding"] for row in rows] == ["mean", "Mass", "Nodule"] * 2
    assert f"{float(rows[3]['auroc']):.3f}" in text
    metrics = classifiers.metrics(results)
    assert metrics["clahe/gain"] == pytest.approx(float(rows[3]["gain"]))
    auroc, gain = classifiers.picture(results).axes
    seeds = [line.get_xdata() for line in auroc.get_lines() if line.get_markersize() == 3]
    assert [list(points) for points in seeds] == [each.values.mean(1).tolist() for each in results]
    assert "minus none" in gain.get_title()


@pytest.mark.parametrize("spread", [0.01, 0.04, 0.1])
def test_the_labels_of_the_picture_do_not_overlap(results: list[SeedResults], spread: float) -> None:
    none = results[0]
    others = [replace(none, name=f"variant {n}", resamples=none.resamples + n * spread) for n in (-1, 1)]
    figure = classifiers.picture([none, *others])
    assert least_gap_px(figure) > 10
    assert len(figure.axes[1].get_lines()) == 1 + 2 * len(others), "the zero line, and nothing for the first"


def test_each_variant_changes_one_step() -> None:
    names = tuple(name for name in preprocessing.VARIANTS if name != preprocessing.NONE)
    recipes = preprocessing.variants(names, ClassifyRecipe(), ArchiveOptions(), "/lungs", "/out")
    assert list(recipes) == list(preprocessing.VARIANTS)
    changed = [recipe.changes_from(recipes["none"].to_dict()) for recipe in recipes.values()]
    assert [len(changes) for changes in changed] == [0, 1, 1, 1, 1, 0], "a lung crop is a location"
    assert recipes["lung-crop"].lung_crop == "/lungs"


def test_the_job_compares_all_networks(
    made: str, runs: dict[str, list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_checks(monkeypatch)
    monkeypatch.setattr(preprocessing, "plain_shards", lambda *_: made)
    monkeypatch.setattr(preprocessing, "shards_of_each", lambda recipes, *_: dict.fromkeys(recipes, made))
    monkeypatch.setattr(study, "train_all", only_named)
    monkeypatch.setattr(study, "score_seeds", lambda trained, name, *_: runs[name])
    data = ArchiveOptions(archive=(str(tmp_path),))
    result = main(Options(out=str(tmp_path), seeds=2, preprocessing=("clahe",), data=data))
    assert result["metrics"]["images"] == IMAGES
    page = (tmp_path / "table.md").read_text()
    assert "60 test images of 30 patients, 2 findings, 2 seeds." in page
    assert all(Path(uri).exists() for uri in (result["table"], *result["pictures"]))
    with pytest.raises(UserError, match="--seeds: expected 1 or more, got 0"):
        main(Options(seeds=0))
