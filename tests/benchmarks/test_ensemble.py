"""An ensemble compared with its members: the metric of its family, the best member, the gain over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.benchmarks.studies import ensemble
from cxr.benchmarks.studies.ensemble import HeldOut
from cxr.cli import ensembles
from cxr.cli.commands import benchmark_detect
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.checkpoint import Checkpoint
from cxr.sources import rle
from tests.families.test_recipes import some_batches
from tests.made_shards import write_shards

CPU = torch.device("cpu")
SIZE, IMAGES = 32, 24
FRAME = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}
HEART = {"label": "Cardiomegaly", "x_min": 10.0, "y_min": 20.0, "x_max": 50.0, "y_max": 60.0}
NODULE = {"label": "Nodule", "x_min": 30.0, "y_min": 8.0, "x_max": 38.0, "y_max": 16.0}


def known(split: str, number: int) -> Mapping[str, object]:
    """A heart in even images, a nodule in odd ones; of every sixth image the boxes are not known."""
    shown = HEART if number % 2 == 0 else NODULE
    return {
        schema.PATIENT_ID: f"{split} {number // 2}",
        schema.LABELS: [int(finding == shown["label"]) for finding in schema.FINDINGS],
        schema.BOXES: None if number % 6 == 0 else [shown],
        schema.RESIZE_TRANSFORM: FRAME,
        schema.HEIGHT_PX: 64,
        schema.WIDTH_PX: 64,
    }


def detector(finds: Callable[[int], bool]) -> Checkpoint:
    """A detector that predicts the true box of some images, by number, and a false nodule in all images."""
    wrong = {**NODULE, "x_min": 0.0, "x_max": 8.0, schema.SCORE: 0.1}

    def scored(predicted: dict[str, torch.Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        numbers = [int(name[-8:-4]) for name in rows[schema.IMAGE_ID].to_pylist()]
        found = [[{**(HEART, NODULE)[n % 2], schema.SCORE: 0.9}] * finds(n) + [wrong] for n in numbers]
        return pa.table([pa.array(found, schema.BOX_SCORES.field(0).type)], schema=schema.BOX_SCORES)

    recipe = SimpleNamespace(
        size=SIZE, family="knowing", score_columns=schema.BOX_SCORES, predict=lambda *_: {}, scored=scored
    )
    return Checkpoint("/kept", recipe, torch.nn.Identity(), schema.FINDINGS, {})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, size=SIZE, known=known)


@pytest.fixture(scope="module")
def images(made: str) -> HeldOut:
    found = ensemble.held_out(made, detector(lambda n: True).recipe)
    assert found is not None
    assert found.split == "test"
    return found


MEMBERS = {"hearts": detector(lambda n: n % 2 == 0), "nodules": detector(lambda n: n % 2 == 1 and n % 3 > 0)}


def test_an_ensemble_of_detectors_gains_from_findings_of_some_members(images: HeldOut) -> None:
    comparison = ensemble.compare(MEMBERS, detector(lambda n: True), images, CPU)
    assert comparison.findings == ("Cardiomegaly", "Nodule")
    assert comparison.members["hearts"].value.tolist() == [1, 0]
    assert comparison.members["nodules"].value.tolist() == pytest.approx([0, 8 / 12])
    assert comparison.ensemble.value.tolist() == [1, 1]
    about = json.loads(json.dumps(comparison.describe()))
    assert (about["metric"], about["split"], about["images"]) == ("map_40", "test", IMAGES)
    assert (about["ensemble"]["mean"], about["best_member"]) == (1, "hearts")
    assert about["members"]["nodules"]["mean"] == pytest.approx(4 / 12)
    gain = [about["gain"][end] for end in ("low", "mean", "high")]
    assert gain == [0.5, 0.5, 0.5], "hearts are found by both, nodules by one: alike for all patients"
    assert "gains 0.500 (0.500 to 0.500) over hearts" in comparison.table()


def test_equal_boxes_have_no_gain_and_intervals_resample_patients(images: HeldOut) -> None:
    same = ensemble.compare(MEMBERS, MEMBERS["hearts"], images, CPU).gain
    assert (same.mean, same.mean_low, same.mean_high) == (0, 0, 0)
    some = ensemble.compare({"nodules": MEMBERS["nodules"]}, detector(lambda n: n % 2 == 1), images, CPU).gain
    assert some.mean == pytest.approx(4 / 12 / 2)
    assert 0 < some.mean_low < some.mean < some.mean_high, "the gain depends on the resampled patients"


def test_images_smaller_than_a_network_needs_are_rejected(images: HeldOut) -> None:
    large = detector(lambda n: True)
    large.recipe.size = 64  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="size=64"):
        ensemble.compare(MEMBERS, large, images, CPU)


def test_validation_images_replace_missing_test_images(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = detector(lambda n: True)
    comparison = ensembles.compare_members(MEMBERS, together, made, 0)
    assert comparison is not None
    assert comparison["images"] == IMAGES
    assert "24 images of the test split, 12 patients" in capsys.readouterr().out
    bare = write_shards(tmp_path / "bare", {"train": 12, "val": 6}, size=SIZE, known=known)
    on_validation = ensembles.compare_members(MEMBERS, together, bare, 0)
    assert on_validation is not None
    assert on_validation["images"] == 6
    assert "no test image has a ground truth" in capsys.readouterr().out
    unboxed = write_shards(tmp_path / "unboxed", {"train": 12, "val": 6}, size=SIZE)
    assert ensembles.compare_members(MEMBERS, together, unboxed, 0) is None
    assert "were not compared" in capsys.readouterr().out


def classifier(probability: Callable[[int], float]) -> Checkpoint:
    """A classifier that gives each image, by number, the same probability of all findings."""

    def scored(predicted: dict[str, torch.Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        numbers = [int(name[-8:-4]) for name in rows[schema.IMAGE_ID].to_pylist()]
        p = [[probability(n)] * len(schema.FINDINGS) for n in numbers]
        return pa.table({schema.PROBABILITIES: pa.array(p, pa.list_(pa.float32()))})

    columns = pa.schema([(schema.PROBABILITIES, pa.list_(pa.float32()))])
    recipe = SimpleNamespace(size=SIZE, family="knowing", score_columns=columns, predict=lambda *_: {}, scored=scored)
    return Checkpoint("/kept", recipe, torch.nn.Identity(), schema.FINDINGS, {})  # pyright: ignore[reportArgumentType]


def test_classifiers_are_compared_by_auroc_of_findings_with_both_classes(made: str) -> None:
    hearts, constant = classifier(lambda n: 1 - n % 2), classifier(lambda n: 0.5)
    images = ensemble.held_out(made, hearts.recipe)
    assert images is not None
    comparison = ensemble.compare({"hearts": hearts, "constant": constant}, constant, images, CPU)
    assert comparison.findings == ("Cardiomegaly", "Nodule"), "the other findings have only negatives"
    assert comparison.members["hearts"].value.tolist() == [1, 0]
    assert comparison.ensemble.value.tolist() == [0.5, 0.5]
    assert comparison.metric == "mean_auroc"
    assert comparison.gain.mean == 0


def test_masks_are_compared_by_dice(tmp_path: Path) -> None:
    left = np.zeros((SIZE, SIZE), bool)
    left[:, : SIZE // 2] = True
    mask = {"label": schema.LUNGS, schema.MASK_BITS: np.packbits(left).tobytes()}
    masked = write_shards(
        tmp_path, {"test": 8}, size=SIZE, known=lambda split, n: {schema.MASKS: [mask] if n < 6 else []}
    )

    def segmenter(columns: int) -> Checkpoint:
        """Predicts a mask of the first columns of the stored image."""
        predicted = np.zeros((SIZE, SIZE), bool)
        predicted[:, :columns] = True

        def scored(_: object, rows: pa.Table, context: ScoringContext) -> pa.Table:
            return pa.table({schema.PRED_MASK_RLE: [rle.encode(predicted)] * rows.num_rows})

        recipe = SimpleNamespace(
            size=SIZE, score_columns=schema.MASK_SCORES, mask_label=schema.LUNGS, predict=lambda *_: {}, scored=scored
        )
        return Checkpoint("/kept", recipe, torch.nn.Identity(), (), {})  # pyright: ignore[reportArgumentType]

    images = ensemble.held_out(masked, segmenter(0).recipe)
    assert images is not None
    comparison = ensemble.compare({"all": segmenter(SIZE), "none": segmenter(0)}, segmenter(16), images, CPU)
    assert comparison.members["all"].mean == pytest.approx(2 / 3)
    assert comparison.members["none"].mean == 0
    assert comparison.ensemble.mean == 1
    assert (comparison.best, comparison.gain.mean) == ("all", pytest.approx(1 / 3))
    assert "Dice" in comparison.table()


def test_boxes_are_written_as_ultralytics_reads_them() -> None:
    """A line per box: finding, center and size, all as shares of the image."""
    lines = [text for _, text in benchmark_detect._labeled(some_batches(1))]
    assert lines == ["2 0.350000 0.450000 0.500000 0.500000\n", "", "", ""]
