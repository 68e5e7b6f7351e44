"""The studies of pneumothorax and lungs: evaluation of known masks, names of networks, and the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr import schema
from cxr.benchmarks.studies import segmentation, segmentation_report
from cxr.cli import study_segmentation as study
from cxr.cli.commands.study_lungs import Options as LungsOptions
from cxr.cli.commands.study_lungs import main as compare_lungs
from cxr.cli.commands.study_pneumothorax import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.cli.study_segmentation import NETWORKS, named
from cxr.errors import UserError
from cxr.evaluation.ground_truth_masks import known_masks
from cxr.evaluation.run import ReportOptions
from cxr.evaluation.segmentation_data import MaskScores, SegmentationEvaluation, evaluate
from cxr.families.checkpoint import Checkpoint
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.metrics.bootstrap import MeanInterval
from cxr.sources import rle
from tests.benchmarks.axis_labels import least_gap_px
from tests.benchmarks.study_jobs import untrained, without_checks
from tests.inference.scored_here import without_ray  # noqa: F401
from tests.made_shards import write_shards

SIZE, IMAGES = 64, 12
CPU = torch.device("cpu")
RECIPE = PneumothoraxRecipe(size=32, architecture="small_unet", tta_flip=False)


def masks_of(shift: int) -> list[np.ndarray]:
    """A square in a third of the images, some pixels further to the right."""
    masks = np.zeros((IMAGES, SIZE, SIZE), bool)
    masks[::3, 16:40, 16 + shift : 40 + shift] = True
    return list(masks)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A third of the images have a bright square, which is their mask; the last image's mask is not known."""

    def known(split: str, number: int) -> Mapping[str, object]:
        mask = masks_of(0)[number % IMAGES]
        bits = [{schema.LABEL: "Pneumothorax", schema.MASK_BITS: np.packbits(mask).tobytes()}]
        return {
            schema.PATIENT_ID: f"p{number // 2}" if number else None,
            schema.PIXELS: (mask * np.uint8(200) + np.uint8(20)).tobytes(),
            schema.MASKS: bits if number < IMAGES - 1 else None,
        }

    return write_shards(tmp_path_factory.mktemp("shards"), {"test": IMAGES, "train": 4}, size=SIZE, known=known)


def evaluation(shards: str, shift: int) -> SegmentationEvaluation:
    """That of a network whose masks are shifted."""
    truth = known_masks(shards, ReportOptions(split="test"), schema.PNEUMOTHORAX)
    masks = masks_of(shift)
    scores = MaskScores(
        uri="scores",
        image_ids=truth.image_ids.combine_chunks(),
        codes=pa.chunked_array([[rle.encode(mask) for mask in masks]]),
        sizes=np.full((IMAGES, 2), SIZE),
        areas_px=np.array([mask.sum() for mask in masks]),
        probabilities=np.array([float(mask.any()) for mask in masks]),
        good=np.ones(IMAGES, bool),
    )
    return evaluate(scores, truth)


def test_metrics_of_a_perfect_network_and_of_one_that_misses_by_a_third(shards: str) -> None:
    torch.manual_seed(0)
    network = Checkpoint("/kept", RECIPE, RECIPE.network(()).eval(), (), {})
    exact, shifted = evaluation(shards, 0), evaluation(shards, 8)  # 8 of 24 pixels away
    perfect = segmentation.summarize("small_unet", [exact], network, CPU)
    assert (perfect.dice.value, perfect.positive_dice.value) == (1, 1)
    assert perfect.figures["mean_iou"] == perfect.figures["image_auroc"] == 1
    assert perfect.figures["empty_prediction_dice"] == pytest.approx(7 / 11)
    assert (perfect.architecture.convolutions, perfect.architecture.stride_px) > (5, 4)
    assert perfect.forward_ms > 0
    assert math.isnan(perfect.dice_sd)
    pair = segmentation.summarize("both", [exact, shifted], network, CPU)
    assert pair.positive_dice.value == pytest.approx((1 + 2 / 3) / 2, abs=0.01)
    assert pair.figures["positive_dice"] == pytest.approx(pair.positive_dice.value)
    assert pair.dice.value == pytest.approx((7 + 4 * pair.positive_dice.value) / 11)
    assert pair.dice.low <= pair.dice.value <= pair.dice.high
    assert pair.dice_sd > 0
    check_report([perfect, pair])


def check_report(results: list[segmentation.SegmentationResult]) -> None:
    """The table, the CSV and the metrics say the same."""
    page = segmentation_report.page(results, schema.PNEUMOTHORAX, "11 images.", "On a CPU.", cut=True)
    metrics = segmentation.metrics(results)
    assert f"{metrics['both_positive_dice']:.3f}" in page
    assert ".560" in page
    assert "without their fully connected layers" in page
    assert "fully connected layers (fc6" not in segmentation_report.page(
        results, schema.PNEUMOTHORAX, "", "", cut=False
    )
    rows = list(csv.DictReader(io.StringIO(segmentation_report.csv(results))))
    assert [row["network"] for row in rows] == ["small_unet", "both"]
    assert float(rows[1]["dice"]) == pytest.approx(metrics["both_dice"])
    assert rows[0]["dice_sd"] == ""
    assert "small_unet_dice_sd" not in metrics
    figures = {"empty_prediction_dice": 0.754, "images": 11, "positives": 4}
    dice = MeanInterval(0.82, 0.754, 0.895)
    narrow = [replace(result, name="unet-resnet18-scse", dice=dice, figures=figures) for result in results]
    figure = segmentation_report.picture(narrow)
    assert len(figure.axes) == 3
    assert least_gap_px(figure) > 10


def test_every_network_can_be_built_as_it_is_named() -> None:
    recipes = named((), PneumothoraxRecipe(size=64, fully_connected=False))
    assert list(recipes) == list(NETWORKS)
    assert len(recipes) == 1 + 4 + 18
    for name in ("small_unet", "unet-resnet18-scse", "fcn16s-alexnet"):
        assert type(recipes[name].segmenter()).__name__.lower() in ("smallunet", "unet", "fullyconvolutional")
    assert (recipes["fcn16s-vgg16"].architecture, recipes["fcn16s-vgg16"].backbone) == ("fcn16s", "vgg16")
    assert recipes["unet-resnet34-scse"].attention == "scse"


def test_mistakes_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"--networks: expected some of small_unet, unet-resnet18.* got segnet"):
        main(Options(out=out, networks=("segnet",)))
    with pytest.raises(UserError, match="got --stream: omit it"):
        main(Options(out=out, data=ArchiveOptions(stream=True)))
    with pytest.raises(UserError, match="--seeds: expected 1 or more, got 0"):
        main(Options(out=out, seeds=0))
    assert not Path(out).exists()


@pytest.mark.usefixtures("without_ray")
def test_the_job_reports_every_network(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train_all", untrained(()))
    without_checks(monkeypatch)
    data = ArchiveOptions(archive=(shards,))
    result = main(Options(out=str(tmp_path), networks=("small_unet",), seeds=2, data=data, recipe=RECIPE))
    assert list(result["checkpoints"]) == [f"small_unet, seed {seed}" for seed in (0, 1)]
    assert result["metrics"]["images"] == IMAGES - 1
    (scores,) = (tmp_path / "small_unet" / "scored-2" / "scores").glob("*.parquet")
    assert pq.read_table(scores)[schema.IMAGE_ID].to_pylist() == [
        f"test-{number:04d}.png" for number in range(IMAGES)
    ]
    page = (tmp_path / "table.md").read_text()
    assert (
        "11 test images of 7 patients, 4 with a mask of pneumothorax, compared at 64 x 64 px, the shards' res" in page
    )
    assert f"{result['metrics']['small_unet_dice']:.3f}" in page
    assert all(Path(uri).exists() for uri in (result["table"], *result["pictures"]))


@pytest.mark.usefixtures("without_ray")
def test_lungs_are_in_every_image_so_that_distances_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of what compares images with and without a mask."""

    def known(split: str, number: int) -> Mapping[str, object]:
        lungs = np.zeros((SIZE, SIZE), bool)
        lungs[16:48, 8:24] = lungs[16:48, 40:56] = True
        return {schema.MASKS: [{schema.LABEL: schema.LUNGS, schema.MASK_BITS: np.packbits(lungs).tobytes()}]}

    uri = write_shards(tmp_path / "shards", {"test": 4, "train": 4}, size=SIZE, known=known)
    monkeypatch.setattr(study, "train_all", untrained(()))
    without_checks(monkeypatch)
    recipe = LungsRecipe(size=32, warmup_size=0, warmup_epochs=0)
    out, data = str(tmp_path / "out"), ArchiveOptions(archive=(uri,))
    result = compare_lungs(LungsOptions(out=out, networks=("small_unet",), data=data, recipe=recipe))
    page = (tmp_path / "out" / "table.md").read_text()
    assert "4 test images of 4 patients, compared at" in page
    assert "HD95, px" in page
    assert ".941 on all images of Montgomery" in page
    assert "positives" not in page
    assert "AUROC" not in page
    assert result["metrics"]["small_unet_hd95_px"] > 0
    assert all(Path(picture).exists() for picture in result["pictures"])


def test_shards_without_masks_are_rejected_before_training(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "train_all", lambda *_: pytest.fail("the networks are trained"))
    without_checks(monkeypatch)
    monkeypatch.setattr(PneumothoraxRecipe, "mask_label", schema.LUNGS)
    data = ArchiveOptions(archive=(shards,))
    with pytest.raises(UserError, match="none of the 12 images in its test split has a known mask of Lungs"):
        main(Options(out=str(tmp_path), networks=("small_unet",), data=data, recipe=RECIPE))
