"""An ensemble compared with its members: the metric of its family, the best member, the gain over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.benchmarks.studies import ensemble
from cxr.benchmarks.studies.ensemble import HeldOut
from cxr.cli import ensembles
from cxr.cli.commands import benchmark_detect
from cxr.evaluation.run import Run, read_run
from cxr.families.classify import ClassifyRecipe
from cxr.sources import rle
from tests.families.test_recipes import some_batches
from tests.inference.scored_here import without_ray  # noqa: F401
from tests.made_shards import write_shards
from tests.saved_checkpoint import save_untrained
from tests.written_runs import write_scored

SIZE, IMAGES = 32, 24
FRAME = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}
HEART = {"label": "Cardiomegaly", "x_min": 10.0, "y_min": 20.0, "x_max": 50.0, "y_max": 60.0}
NODULE = {"label": "Nodule", "x_min": 30.0, "y_min": 8.0, "x_max": 38.0, "y_max": 16.0}
DETECTOR = SimpleNamespace(score_columns=schema.BOX_SCORES)
CLASSIFIER = SimpleNamespace(
    score_columns=pa.schema([(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))])
)
SEGMENTER = SimpleNamespace(score_columns=schema.MASK_SCORES, mask_label=schema.LUNGS)


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


def scored(folder: Path, recipe: Any, score: Callable[[int], Mapping[str, object]], split: str = "test") -> Run:
    """The run of a network that gives each image of a split, by number, these scores."""
    fields = pa.schema([*schema.SCORES, *recipe.score_columns], {schema.FINDINGS_KEY: json.dumps(schema.FINDINGS)})
    side = {schema.HEIGHT_PX: 64, schema.WIDTH_PX: 64}
    rows = [{schema.IMAGE_ID: f"{split}-{n:04d}.png", **side, **score(n)} for n in range(IMAGES)]
    settings = {"archive": "shards", "checkpoint_sha256": "0", "recipe": {"family": "knowing"}}
    return read_run(write_scored(folder, settings, pa.Table.from_pylist(rows, fields)))


def detector(folder: Path, finds: Callable[[int], bool], split: str = "test") -> Run:
    """A detector that predicts the ground-truth box of some images, by number, and a false nodule in all images."""
    wrong = {**NODULE, "x_min": 0.0, "x_max": 8.0, schema.SCORE: 0.1}

    def score(n: int) -> Mapping[str, object]:
        return {schema.PRED_BOXES: [{**(HEART, NODULE)[n % 2], schema.SCORE: 0.9}] * finds(n) + [wrong]}

    return scored(folder, DETECTOR, score, split)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, size=SIZE, known=known)


@pytest.fixture(scope="module")
def images(made: str) -> HeldOut:
    return held_out(made, DETECTOR)


def held_out(data: str, recipe: Any, split: str = "test") -> HeldOut:
    found = ensemble.held_out(data, recipe)
    assert found is not None
    assert found.split == split
    return found


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("members")
    return {
        "hearts": detector(folder / "hearts", lambda n: n % 2 == 0),
        "nodules": detector(folder / "nodules", lambda n: n % 2 == 1 and n % 3 > 0),
    }


def test_an_ensemble_of_detectors_gains_from_findings_of_some_members(
    images: HeldOut, members: dict[str, Run], tmp_path: Path
) -> None:
    comparison = ensemble.compare(members, detector(tmp_path / "all", lambda n: True), images)
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


def test_equal_boxes_have_no_gain_and_intervals_resample_patients(
    images: HeldOut, members: dict[str, Run], tmp_path: Path
) -> None:
    same = ensemble.compare(members, members["hearts"], images).gain
    assert (same.mean, same.mean_low, same.mean_high) == (0, 0, 0)
    nodules = detector(tmp_path / "nodules", lambda n: n % 2 == 1)
    some = ensemble.compare({"nodules": members["nodules"]}, nodules, images).gain
    assert some.mean == pytest.approx(4 / 12 / 2)
    assert 0 < some.mean_low < some.mean < some.mean_high, "the gain depends on the resampled patients"


def test_validation_images_replace_missing_test_images(tmp_path: Path) -> None:
    bare = write_shards(tmp_path / "bare", {"train": 12, "val": IMAGES}, size=SIZE, known=known)
    images = held_out(bare, DETECTOR, "val")
    every = detector(tmp_path / "all", lambda n: True, "val")
    assert ensemble.compare({"all": every}, every, images).images == IMAGES
    unboxed = write_shards(tmp_path / "unboxed", {"train": 12, "val": 6}, size=SIZE)
    for recipe in (DETECTOR, CLASSIFIER, SEGMENTER):
        assert ensemble.held_out(unboxed, recipe) is None  # pyright: ignore[reportArgumentType]


def test_classifiers_are_compared_by_auroc_of_findings_with_both_classes(made: str, tmp_path: Path) -> None:
    def classifier(name: str, probability: Callable[[int], float]) -> Run:
        count = len(schema.FINDINGS)
        return scored(
            tmp_path / name,
            CLASSIFIER,
            lambda n: {schema.PROBABILITIES: [probability(n)] * count, schema.DECISIONS: [0] * count},
        )

    hearts, constant = classifier("hearts", lambda n: 1 - n % 2), classifier("constant", lambda n: 0.5)
    comparison = ensemble.compare({"hearts": hearts, "constant": constant}, constant, held_out(made, CLASSIFIER))
    assert comparison.findings == ("Cardiomegaly", "Nodule"), "the other findings have only negatives"
    assert comparison.members["hearts"].value.tolist() == [1, 0]
    assert comparison.ensemble.value.tolist() == [0.5, 0.5]
    assert comparison.metric == "mean_auroc"
    assert comparison.gain.mean == 0


def test_masks_are_compared_by_dice(tmp_path: Path) -> None:
    left = np.zeros((SIZE, SIZE), bool)
    left[:, : SIZE // 2] = True
    mask = {"label": schema.LUNGS, schema.MASK_BITS: np.packbits(left).tobytes()}

    def masks(split: str, number: int) -> Mapping[str, object]:
        own = {schema.MASKS: [mask] if number < 6 else []}
        return own | {schema.RESIZE_TRANSFORM: FRAME, schema.HEIGHT_PX: 64, schema.WIDTH_PX: 64}

    masked = write_shards(tmp_path / "shards", {"test": 8}, size=SIZE, known=masks)

    def segmenter(columns: int) -> Run:
        """Predicts a mask of the first columns of the original, which is twice as large as the stored image."""
        predicted = np.zeros((64, 64), bool)
        predicted[:, :columns] = True
        found = {
            schema.PRED_MASK_RLE: rle.encode(predicted),
            schema.PRED_MASK_AREA_PX: 64 * columns,
            schema.PRED_MASK_PROBABILITY: 0.5,
        }
        return scored(tmp_path / f"{columns}", SEGMENTER, lambda n: found)

    images = held_out(masked, SEGMENTER)
    comparison = ensemble.compare({"all": segmenter(64), "none": segmenter(0)}, segmenter(32), images)
    assert comparison.images == 6
    assert comparison.members["all"].mean == pytest.approx(2 / 3)
    assert comparison.members["none"].mean == 0
    assert comparison.ensemble.mean == 1
    assert (comparison.best, comparison.gain.mean) == ("all", pytest.approx(1 / 3))
    assert "Dice" in comparison.table()


@pytest.mark.usefixtures("without_ray")
def test_members_and_ensemble_score_held_out_images_in_one_pass(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = [ClassifyRecipe(size=SIZE, seed=seed) for seed in range(2)]
    uris = {f"member-{n}": save_untrained(tmp_path / f"{n}", of, schema.FINDINGS) for n, of in enumerate(recipes)}
    out = str(tmp_path / "out")
    result = ensembles.join_checkpoints(uris, made, out)
    (folder,) = (tmp_path / "out").glob("scored-*")
    table = storage.read_parquet(str(next((folder / "scores").glob("*.parquet"))))
    assert table[schema.IMAGE_ID].to_pylist() == [f"test-{number:04d}.png" for number in range(IMAGES)]
    names = ("member-0", "member-1", "ensemble")
    assert {f"{name}/{schema.PROBABILITIES}" for name in names} <= set(table.column_names)
    compared = result["comparison"]
    assert (compared["images"], compared["patients"], [*compared["members"]]) == (IMAGES, 12, [*uris])
    assert compared["gain"]["mean"] == pytest.approx(0, abs=1e-6), "the members are equal"
    assert "24 images of the test split, 12 patients" in capsys.readouterr().out


def test_boxes_are_written_as_ultralytics_reads_them() -> None:
    """A line per box: finding, center and size, all as shares of the image."""
    lines = [text for _, text in benchmark_detect._labeled(some_batches(1))]
    assert lines == ["2 0.350000 0.450000 0.500000 0.500000\n", "", "", ""]
