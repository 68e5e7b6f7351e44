"""Options, manifest and recipe are checked before Ray starts and before an image is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.cli.search_jobs import tune_job
from cxr.cli.training_jobs import train_job
from cxr.data import ingest, shards
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe
from cxr.families.classify import ClassifyRecipe
from cxr.families.detect import DetectRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.inference.plan import plan_scoring
from cxr.phantom.archive import write_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.sources import chestxray14
from cxr.sources.options import Labeling, ReadOptions
from cxr.training.options import RunOptions, SearchOptions
from tests.made_shards import write_shards

ALIGN = AlignRecipe(size=32, backbone="conv3", lungs=False)
SHARDS = {"train": 4, "val": 2}


@pytest.fixture(autouse=True)
def _neither_ray_nor_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started, or an image decoded, before the mistake was reported")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr("cxr.runtime.cluster.connect", started)
    monkeypatch.setattr(ingest, "ingest", started)


def train(recipe: Recipe, archive: str, tmp_path: Path, **options: Any) -> None:
    train_job(
        recipe, ArchiveOptions(archive=(archive,), **{"stored_size": 64, **options}), RunOptions(), out(tmp_path)
    )


def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def saved(folder: Path, recipe: Recipe) -> checkpoint.Checkpoint:
    task = recipe.task(recipe.network(()))
    checkpoint.save(folder, recipe, task, task.network.state_dict(), findings=(), metrics={})
    return checkpoint.load(str(folder))


def unlabeled(tmp_path: Path) -> str:
    """An archive with lung masks and without labels."""
    write_masked_phantom(str(tmp_path / "raw"), 6, "montgomery", size=64)
    return str(tmp_path / "raw")


def labeled(tmp_path: Path, count: int = 12) -> str:
    write_phantom(str(tmp_path / "labeled"), count, size=64)
    return str(tmp_path / "labeled")


@pytest.mark.parametrize(
    "recipe",
    [
        AecnnRecipe(size=32, patch=32, backbone="resnet18"),
        AttendRecipe(size=32),
        DetectRecipe(size=32),
        LocalizeRecipe(size=32),
    ],
    ids=lambda recipe: recipe.family,
)
def test_families_that_learn_from_labels_need_an_archive_with_labels(recipe: Recipe, tmp_path: Path) -> None:
    archive = unlabeled(tmp_path)
    with pytest.raises(UserError, match=f"has no labels, but family {recipe.family} learns from labels: use an"):
        train(recipe, archive, tmp_path)
    with pytest.raises(UserError, match="has no labels"):
        tune_job(recipe, ArchiveOptions(archive=(archive,)), SearchOptions(), RunOptions(), out(tmp_path))
    assert not (tmp_path / "out").exists()


def test_sampling_by_a_finding_needs_its_labels(tmp_path: Path) -> None:
    recipe = PneumothoraxRecipe(
        size=32, architecture="small_unet", positive_fraction_start=0.5, positive_fraction_end=0.5
    )
    with pytest.raises(UserError, match="has no labels of Pneumothorax, so its images cannot be sampled by it"):
        train(recipe, unlabeled(tmp_path), tmp_path)


def test_segmentation_needs_an_archive_with_masks(tmp_path: Path) -> None:
    archive = labeled(tmp_path)
    for file in storage.list_files(archive):
        if file.path.endswith("truth.parquet"):
            storage.delete(file.uri)
    with pytest.raises(UserError, match="has no mask of Lungs, from which family lungs learns"):
        train(LungsRecipe(size=32, warmup_size=0, warmup_epochs=0), archive, tmp_path)


def test_a_detector_needs_an_archive_with_boxes(tmp_path: Path) -> None:
    archive, recipe = labeled(tmp_path), DetectRecipe(size=64)
    storage.delete(f"{archive}/{chestxray14.BOXES_FILE}")
    with pytest.raises(UserError, match="no boxes outside its test split, but family detect learns from boxes: use"):
        train(recipe, archive, tmp_path)
    boxless = write_shards(tmp_path / "shards", SHARDS, size=64)
    about = storage.read_json(f"{boxless}/{shards.ARCHIVE_FILE}")
    storage.write_json(f"{boxless}/{shards.ARCHIVE_FILE}", about | {"most_boxes": 0})
    with pytest.raises(UserError, match="has no boxes"):
        train(recipe, boxless, tmp_path)


def test_both_splits_need_images(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"usable images in the train split and in the val split of .*, got \d+ and 0, "
    ):
        train(ALIGN, labeled(tmp_path, 1), tmp_path)
    with pytest.raises(
        UserError, match=r"usable images in the train split and in the val split of .*, got 4 and 0, "
    ):
        train(ALIGN, write_shards(tmp_path / "shards", {"train": 4}), tmp_path)


def test_images_must_be_as_large_as_the_network_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected stored images of at least size=96 px, got 64 px"):
        train(ALIGN.replace(size=96), labeled(tmp_path), tmp_path)
    small = write_shards(tmp_path / "shards", SHARDS)
    with pytest.raises(UserError, match="expected stored images of at least size=96 px"):
        train(ALIGN.replace(size=96), small, tmp_path)
    with pytest.raises(UserError, match="expected stored images of at least size=96 px"):
        plan_scoring(small, {"": saved(tmp_path / "checkpoint", ALIGN.replace(size=96))}, ReadOptions())


def test_shards_must_have_the_enhancement_of_recipe_and_checkpoint(tmp_path: Path) -> None:
    plain, recipe = write_shards(tmp_path / "shards", SHARDS), ALIGN.replace(equalize="clahe")
    refused: tuple[Callable[[], object], ...] = (
        lambda: train(recipe, plain, tmp_path),
        lambda: plan_scoring(plain, {"": saved(tmp_path / "checkpoint", recipe)}, ReadOptions()),
    )
    for call in refused:
        with pytest.raises(UserError, match="was ingested with no enhancement, but this run needs --equalize clahe"):
            call()


def test_shards_must_have_the_crop_of_the_recipe(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "shards", SHARDS)
    about = storage.read_json(f"{whole}/{shards.ARCHIVE_FILE}")
    crop = {"rule": "lungs", "sha256": "0" * 64, "margin": 0.05}
    storage.write_json(f"{whole}/{shards.ARCHIVE_FILE}", about | {"crop": crop})
    with pytest.raises(
        UserError, match=r"contains crops by the lung checkpoint 000000000000 .* whole images are needed"
    ):
        train(ALIGN, whole, tmp_path)


def test_streaming_rejects_settings_that_need_shards(tmp_path: Path) -> None:
    archive = labeled(tmp_path)
    with pytest.raises(UserError, match="is not shards, but folds require"):
        train(ALIGN.replace(folds=3, fold=0), archive, tmp_path, stream=True)


def test_a_missing_archive_and_an_existing_run_are_reported_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none"):
        train(ALIGN, str(tmp_path / "none"), tmp_path)
    storage.write_text(f"{out(tmp_path)}/train/epoch_0001/x", "")
    storage.write_text(f"{out(tmp_path)}/search/x", "")
    archive = labeled(tmp_path)
    with pytest.raises(UserError, match="train already contains a run: use --resume"):
        train(ALIGN, archive, tmp_path)
    with pytest.raises(UserError, match="search already contains a run: use --resume"):
        tune_job(ALIGN, ArchiveOptions(archive=(archive,)), SearchOptions(), RunOptions(), out(tmp_path))


def test_the_phantom_archive_is_checked_as_well(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected stored images of at least size=512 px"):
        train_job(ALIGN.replace(size=512), ArchiveOptions(), RunOptions(), out(tmp_path))


def test_the_network_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchvision has no network resnet1"):
        train_job(ClassifyRecipe(backbone="resnet1"), ArchiveOptions(), RunOptions(), out(tmp_path))


def test_options_that_describe_an_archive_need_one(tmp_path: Path) -> None:
    archive = ArchiveOptions(labeling=Labeling(masks="masks.csv"))
    with pytest.raises(UserError, match="expected --archive with --masks, got none: add it"):
        train_job(ALIGN, archive, RunOptions(), out(tmp_path))
