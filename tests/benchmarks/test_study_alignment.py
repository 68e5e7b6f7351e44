"""The alignment study: ECC as a crop, overlap of lungs, gains over seeds and patients, the tables, and the job."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxr import schema
from cxr.benchmarks.studies import aligned_classification as classification
from cxr.benchmarks.studies import classifiers, ecc, ecc_crop
from cxr.benchmarks.studies.aligned_classification import ALIGNED, ECC, INITIAL, VARIANTS, ArchiveResult
from cxr.benchmarks.studies.ecc import Ecc, Stage
from cxr.benchmarks.studies.ecc_crop import EccCrop
from cxr.cli import study_alignment as study
from cxr.cli.commands.study_alignment import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.data import ingest, shards
from cxr.data.manifest_files import StoredPart
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores
from cxr.families.classify import ClassifyRecipe
from cxr.imaging.enhance import Enhancement
from cxr.metrics.alignment import corner_distance
from cxr.phantom.archive import make_exams
from cxr.runtime import cluster
from tests.aligners import fixed_aligner
from tests.benchmarks.study_jobs import untrained, without_cluster
from tests.inference.scored_here import without_ray  # noqa: F401
from tests.made_shards import write_shards

QUICK = Ecc(rounds=((Stage(24, False, 10),), (Stage(24, True, 10),)))


def phantoms(count: int, size: int) -> np.ndarray:
    exams = make_exams(count, findings=["Cardiomegaly"], prevalence=0.5, size=size)
    return np.stack([exam.phantom.pixels for exam in exams])


def test_an_image_of_the_group_gets_the_same_transform_from_its_templates() -> None:
    images = phantoms(5, 64)
    registered = ecc.align(images, QUICK)
    alone = torch.stack([ecc.align_one(image, registered.templates, QUICK) for image in images])
    torch.testing.assert_close(alone, registered.theta)
    assert corner_distance(alone, torch.eye(2, 3)[None]).max() > 0.01


def test_ecc_undoes_a_shift_at_any_resolution(tmp_path: Path) -> None:
    images = phantoms(8, 256)
    templates = str(tmp_path / "templates.npz")
    small = np.stack([image.reshape(128, 2, 128, 2).mean((1, 3)) for image in images]).astype(np.uint8)
    ecc_crop.write_templates(templates, small)
    crop = EccCrop(templates, Enhancement()).loaded()
    moved = np.roll(images[0], 12, axis=1)
    moved[:, :12] = 0
    middle = np.array([[256, 256]])
    here, there = (crop(image).transform(512).to_original(middle) for image in (images[0], moved))
    np.testing.assert_allclose(there - here, [[12, 0]], atol=4)
    contrasted = EccCrop(templates, Enhancement(equalize="clahe")).loaded()(images[0]).transform(512)
    assert not np.allclose(contrasted.to_original(middle), here), "images are registered as they are stored"


def labeled(noise: float, seed: int) -> LabeledScores:
    """Scores of 60 images of 30 patients, which are better the smaller the noise is."""
    labels = (np.arange(60) % 2)[:, None].astype(np.int8)
    patients = np.random.default_rng(5).permutation(np.repeat(np.arange(30), 2))
    logits = 2 * labels - 1 + 2 * noise * np.random.default_rng(seed).normal(size=(60, 1))
    probabilities = 1 / (1 + np.exp(-logits))
    return LabeledScores(("Mass",), np.arange(60), patients, probabilities, labels, labels, 0, 0, 0)


@pytest.fixture(scope="module")
def compared() -> ArchiveResult:
    noises = {INITIAL: 1.2, ALIGNED: 0.5, ECC: 1.2}
    variants = [
        classifiers.result(name, [labeled(noise, seed) for seed in range(3)]) for name, noise in noises.items()
    ]
    overlaps = {INITIAL: 0.6, ALIGNED: 0.8, ECC: 0.7}
    return ArchiveResult("archive", 60, 30, tuple(variants), overlaps, {INITIAL: 0, ALIGNED: 2, ECC: 0})


def test_the_tables_compare_each_variant_with_initial_images(compared: ArchiveResult) -> None:
    page = classification.page([compared], 3)
    assert "60 test images of 30 patients, 1 finding; 3 seeds." in page
    assert "2 of archive, aligned" in page
    assert "a mean AUROC of 0.8110 on initial and 0.8124 on aligned images" in page
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(classification.csv([compared])))}
    assert float(rows[ALIGNED]["gain_low"]) > 0.02
    assert [float(rows[ECC][f"gain{end}"]) for end in ("", "_low", "_high")] == [0, 0, 0]  # the same scores
    metrics = classification.metrics([compared])
    assert metrics["archive/aligned/lung_iou"] == 0.8
    assert metrics["archive/aligned/stored_whole"] == 2
    aurocs, gains = classification.picture([compared]).axes
    at_zero = [[line for line in ax.get_lines() if list(line.get_xdata()) == [0, 0]] for ax in (aurocs, gains)]
    assert [len(of) for of in at_zero] == [0, 2], "the line of no difference, and ECC's interval"


# ---- The job


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch, without_ray: None) -> None:  # noqa: F811
    def serial(parts: Sequence[StoredPart], make: Any, args: Sequence[Any] = ()) -> list[dict[str, Any]]:
        work = make(*args)
        return [work(part.read()) for part in parts]

    monkeypatch.setattr(ingest, "map_parts", serial)
    monkeypatch.setattr(cluster, "check_shared", lambda uri: None)
    monkeypatch.setattr(study, "train_all", untrained(schema.FINDINGS))
    without_cluster(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("without_training")
def test_the_job_compares_the_same_images(tmp_path: Path) -> None:
    aligner = fixed_aligner(tmp_path / "aligner", turn_deg=8, scale=0.9)
    recipe = ClassifyRecipe(size=32, epochs=1, aligner=aligner)
    data = ArchiveOptions(phantoms=24, stored_size=32)
    out = tmp_path / "out"
    result = main(Options(out=str(out), poses=(2.0,), seeds=1, data=data, recipe=recipe))
    made = result["archives"]["phantoms-2"]["shards"]
    assert [shards.read_info(made[name]).crop is not None for name in VARIANTS] == [False, True, False]
    ids = [
        classification.tested_rows(made[name], [schema.IMAGE_ID])[schema.IMAGE_ID].to_pylist() for name in VARIANTS
    ]
    assert ids[0] == ids[1] == ids[2]
    metrics = result["metrics"]
    assert metrics["phantoms-2/aligned/lung_iou"] == pytest.approx(metrics["phantoms-2/initial/lung_iou"], abs=0.03)
    assert metrics["phantoms-2/ecc/lung_iou"] > metrics["phantoms-2/initial/lung_iou"] + 0.05
    assert (out / "table.md").exists()
    assert all(Path(uri).exists() for uri in (result["table"], *result["pictures"]))


def test_mistakes_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"test": 4}, size=32)
    recipe = ClassifyRecipe(size=32)
    for options, message in (
        (
            Options(data=ArchiveOptions(archive=(made,)), recipe=recipe),
            "got shards: use the archive",
        ),
        (Options(recipe=recipe.replace(lung_crop="/lungs")), "the study aligns the images"),
        (Options(poses=(), recipe=recipe), "--poses: expected 1 or more without --archive, got none"),
        (Options(poses=(1, 1), recipe=recipe), "--poses: expected each value once, got 1 1"),
        (Options(seeds=0, recipe=recipe), "--seeds: expected 1 or more, got 0"),
        (Options(data=ArchiveOptions(archive=("/a", "/b")), recipe=recipe), "expected one --archive, got 2"),
    ):
        with pytest.raises(UserError, match=message):
            main(dataclasses.replace(options, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
