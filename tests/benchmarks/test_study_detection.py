"""The detection study: networks, ensembles, fusion and the filter for normal images, the report, and the job."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.benchmarks.studies import detection, detection_report
from cxr.benchmarks.studies.detection import FUSION, NORMAL, PREPROCESSING, SIZE, DetectionResult, Detections
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli import study_detection as study
from cxr.cli.commands import COMMANDS
from cxr.cli.commands.study_detection import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.run import ReportOptions, Run, read_run
from cxr.families.detect import DetectRecipe
from cxr.phantom.archive import write_phantom
from cxr.sources import open_manifest
from tests.benchmarks.study_jobs import only_named, without_checks
from tests.made_shards import write_shards
from tests.written_runs import write_scored

IMAGES = 24
FRAME = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}
HEART = {"label": "Cardiomegaly", "x_min": 10.0, "y_min": 20.0, "x_max": 50.0, "y_max": 60.0}
NODULE = {"label": "Nodule", "x_min": 30.0, "y_min": 8.0, "x_max": 38.0, "y_max": 16.0}
Finds = Callable[[int], bool]


def true_box(number: int) -> Mapping[str, object] | None:
    """A heart, a nodule or, in every third image, nothing."""
    return (HEART, NODULE, None)[number % 3]


def known(split: str, number: int) -> Mapping[str, object]:
    shown = true_box(number)
    return {
        schema.PATIENT_ID: f"{split} {number // 2}",
        schema.LABELS: [int(bool(shown) and shown["label"] == finding) for finding in schema.FINDINGS],
        schema.BOXES: [shown] if shown else [],
        schema.RESIZE_TRANSFORM: FRAME,
        schema.HEIGHT_PX: 64,
        schema.WIDTH_PX: 64,
    }


def detector(folder: Path, finds: Finds) -> Run:
    """The run of a network that predicts the ground-truth box of some images, and a false nodule in all."""
    wrong = {**NODULE, "x_min": 0.0, "x_max": 8.0, schema.SCORE: 0.05}
    fields = pa.schema(
        [*schema.SCORES, *DetectRecipe.score_columns], {schema.FINDINGS_KEY: json.dumps(schema.FINDINGS)}
    )
    side = {schema.HEIGHT_PX: 64, schema.WIDTH_PX: 64}
    rows = []
    for n in range(IMAGES):
        true = true_box(n)
        boxes = [{**true, schema.SCORE: 0.8}] if true and finds(n) else []
        rows.append({schema.IMAGE_ID: f"test-{n:04d}.png", **side, schema.PRED_BOXES: [*boxes, wrong]})
    settings = {"archive": "shards", "checkpoint_sha256": "0", "recipe": {"family": "detect"}}
    return read_run(write_scored(folder, settings, pa.Table.from_pylist(rows, fields)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": 12, "val": 6, "test": IMAGES}, known=known)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Without preprocessing, one seed detects hearts and the other nodules; with CLAHE, both detect hearts."""
    folder = tmp_path_factory.mktemp("runs")

    def hearts(n: int) -> bool:
        return n % 3 == 0

    finds: dict[str, list[Finds]] = {"none": [hearts, lambda n: n % 3 == 1], "clahe": [hearts, hearts]}
    return {name: [detector(folder / f"{name}{k}", f) for k, f in enumerate(of)] for name, of in finds.items()}


@pytest.fixture(scope="module")
def detections(made: str, runs: dict[str, list[Run]]) -> Detections:
    truth = known_boxes(made, ReportOptions(split="test"))
    assert isinstance(truth, BoxTruth)
    return Detections.of(runs, truth)


@pytest.fixture(scope="module")
def results(detections: Detections) -> dict[tuple[str, str], DetectionResult]:
    sure = np.where(detections.normal == schema.POSITIVE, 0.99, 0.01)
    compared = detection.compare(detections, detection.fusions(0.55), sure)
    return {(result.section, result.name): result for result in compared}


def test_networks_are_compared_by_seed_and_patient(results: dict[tuple[str, str], DetectionResult]) -> None:
    plain, clahe = results[PREPROCESSING, "none"], results[PREPROCESSING, "clahe"]
    assert plain.findings == ("Cardiomegaly", "Nodule")
    assert plain.values.tolist() == [[1, 0], [0, 1]]
    mean, gain = plain.mean(), clahe.gain(plain)
    assert (mean.value, mean.sd) == (0.5, 0)
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    assert clahe.values.tolist() == [[1, 0], [1, 0]]


def test_ensembles_gain_from_members_that_detect_other_findings(
    results: dict[tuple[str, str], DetectionResult],
) -> None:
    one, two = results[SIZE, "1 network"], results[SIZE, "2 networks"]
    assert (one.mean().value, two.mean().value, two.networks) == (0.5, 1, 2)
    assert two.gain(one).value == 0.5
    mixed = results[SIZE, "2, one of each preprocessing"]
    assert mixed.values.tolist() == [[1, 0], [1, 1]], "the first seeds detect hearts, the second ones both"
    assert results[SIZE, "all networks"].networks == 4
    assert {name for section, name in results if section == FUSION} == set(detection.fusions(0.5))
    assert all(result.mean().value == 1 for (section, _), result in results.items() if section == FUSION)


def test_the_filter_of_normal_images_adds_the_class_of_images_without_findings(
    results: dict[tuple[str, str], DetectionResult],
) -> None:
    without, published = results[NORMAL, "no filter"], results[NORMAL, "classifier, low 0.08, high 0.95"]
    assert without.findings == ("Cardiomegaly", "Nodule", schema.NO_FINDING)
    assert without.values.tolist() == [[1, 1, 0]], "each image has a box, so that none is predicted normal"
    assert published.values.tolist() == [[1, 1, 1]]
    always = results[NORMAL, "1 − highest score, always added"]
    assert always.values.tolist() == [[1, 1, 1]], "images with a finding have a box with a high score"


def test_an_image_without_known_labels_is_neither_normal_nor_abnormal(detections: Detections) -> None:
    unknown = np.full(IMAGES, schema.UNKNOWN, np.int8)
    hidden = Detections(**{**vars(detections), "normal": unknown})
    filtered = hidden.filtered(hidden.predicted["none"][0], np.ones(IMAGES), 0.0, 2.0)
    assert hidden.with_normal("", filtered, 1).findings == ("Cardiomegaly", "Nodule")


def test_the_report_shows_intervals_gains_and_published_values(
    results: dict[tuple[str, str], DetectionResult],
) -> None:
    page = detection_report.page([*results.values()], "24 images.")
    assert "| 2 networks                     | 2        | 1.000 (1.000 to 1.000) |" in page
    assert ".201 to .269 (one YOLOv5)" in page
    assert set(detection_report.PUBLISHED) - {SIZE} <= {"/".join(key) for key in results}
    assert re.search(r"\| all networks .* the winners' \.321 \|", page)
    rows = list(csv.DictReader(io.StringIO(detection_report.csv([*results.values()]))))
    two = [row for row in rows if (row["section"], row["name"]) == (SIZE, "2 networks")]
    assert [(row["finding"], float(row["ap"])) for row in two] == [("mean", 1), ("Cardiomegaly", 1), ("Nodule", 1)]
    assert float(two[0]["gain"]) == 0.5
    metrics = detection.metrics([*results.values()])
    assert metrics[f"{SIZE}/2 networks/gain"] == 0.5
    assert not any(np.isnan(value) for value in metrics.values())
    assert len(detection_report.picture([*results.values()]).axes) == 4


def test_labels_of_the_filter_say_which_images_show_anything(made: str) -> None:
    rows = {row["image"]: (row["Abnormal"], row["split"]) for row in study.abnormal_labels(made).to_pylist()}
    assert len(rows) == 12 + 6 + IMAGES
    assert [rows[f"test-{n:04d}.png"] for n in range(3)] == [("1", "test"), ("1", "test"), ("0", "test")]


def test_the_filter_is_trained_on_the_splits_of_the_detectors(tmp_path: Path) -> None:
    """Even if the archive has others: its first image is listed for testing, and the shards train on it."""
    archive = str(tmp_path / "archive")
    write_phantom(archive, 40, size=64)
    images = open_manifest(archive).table
    names, own = images[schema.IMAGE_ID].to_pylist(), images[schema.SPLIT].to_pylist()
    splits = [{"test": "train", "train": "val", "val": "test"}[split] for split in own]
    labels = ["1" if number % 3 else "0" for number in range(len(names))]
    table = pa.table({"image": names, "split": splits, "Abnormal": labels})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "abnormal_labels", lambda data: table)
        labeling = study.filter_labeling("shards", str(tmp_path / "labels.parquet"))
    manifest = open_manifest(archive, labeling=labeling)
    assert manifest.findings == ("Abnormal",)
    read = dict(
        zip(manifest.table[schema.IMAGE_ID].to_pylist(), manifest.table[schema.SPLIT].to_pylist(), strict=True)
    )
    assert read == dict(zip(names, splits, strict=True))
    known = dict(
        zip(manifest.table[schema.IMAGE_ID].to_pylist(), manifest.table[schema.LABELS].to_pylist(), strict=True)
    )
    assert known == {name: [int(label)] for name, label in zip(names, labels, strict=True)}


def test_a_filter_needs_normal_images(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": ["a", "b", "c"], "split": ["train", "train", "val"], "Abnormal": ["1", "0", "1"]})
    monkeypatch.setattr(study, "abnormal_labels", lambda data: table)
    with pytest.raises(UserError, match=r"normal and abnormal images in the val split.* use --classifier none"):
        study.filter_labeling(made, str(tmp_path / "labels.parquet"))


def test_mistakes_are_reported_before_anything_is_written(made: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for wrong, message in (
        ({"preprocessing": ("sharpen",)}, "expected some of median, nlm, percentile, clahe, lung-crop, got sharpen"),
        ({"recipe": DetectRecipe(equalize="clahe")}, "expected none of --denoise, --normalize, --equalize"),
        ({"preprocessing": ("clahe",), "lungs": "/lungs"}, "--lungs: expected nothing without"),
        ({"classifier": "densenet121-chexnet"}, "expected stored images of at least 224 px, got 128 px"),
        ({"members": 0}, "--members: expected 1 or more, got 0"),
        ({"data": ArchiveOptions(archive=(made,))}, "got shards: use the archive"),
        ({"data": ArchiveOptions(stream=True)}, "got --stream: omit it"),
        ({"data": ArchiveOptions(archive=(str(tmp_path),))}, "--lungs: expected a checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            main(Options(out=out, **wrong))
    assert not Path(out).exists()


def test_the_preset_sets_the_networks_and_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    job = COMMANDS["study detection"].load()
    options = job.parse(["--preset", "published", "--members", "2"]).job
    assert (options.recipe.architecture, options.recipe.size, options.data.stored_size) == ("yolov5m", 512, 512)
    assert (options.members, options.classifier) == (2, "densenet121-chexnet")
    with pytest.raises(SystemExit):
        job.parse(["--preset", "other"])
    assert "--preset: expected one of published, got other" in capsys.readouterr().err


def test_the_job_compares_all_networks(
    made: str, runs: dict[str, list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_checks(monkeypatch)
    monkeypatch.setattr(preprocessing, "plain_shards", lambda *_: made)
    monkeypatch.setattr(preprocessing, "shards_of_each", lambda recipes, *_: dict.fromkeys(recipes, made))
    monkeypatch.setattr(study, "train_all", only_named)
    monkeypatch.setattr(study, "score_seeds", lambda trained, name, *_: runs[name])
    trained = study.FilterClassifier("checkpoint", "shards")
    monkeypatch.setattr(study, "train_filter", lambda *_: trained)
    monkeypatch.setattr(study.FilterClassifier, "applied", lambda *_: (np.full(IMAGES, 0.5), 0.5))
    data = ArchiveOptions(archive=(str(tmp_path),))
    result = main(Options(out=str(tmp_path), members=2, preprocessing=("clahe",), data=data))
    assert result["metrics"][f"{SIZE}/2 networks/map_40"] == 1
    assert len(result["checkpoints"]) == 4
    page = (tmp_path / "table.md").read_text()
    assert "24 test images of 12 patients, 8 of them normal, with 16 boxes; 2 seeds." in page
    assert all(Path(uri).exists() for uri in (result["table"], *result["pictures"]))
