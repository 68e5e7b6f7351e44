"""The study of detection: preprocessing, size of ensembles, fusion, and the filter of normal images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr import schema, storage
from cxr.benchmarks.studies import detection, detection_report, ensemble
from cxr.benchmarks.studies.detection import DetectionResult, Detections
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli.ensembles import score_seeds
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import begin, networks_record, write_files
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.data import shard_index, shards
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.run import Split
from cxr.export.kaggle_vinbigdata import normal_probabilities
from cxr.families.classify import ClassifyRecipe
from cxr.families.presets import preset
from cxr.metrics.classification.ranking import auroc
from cxr.reporting.tables import csv_text
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all
from cxr.wording import counted

if TYPE_CHECKING:
    from cxr.cli.commands.study_detection import Options

FILTER = "normal-filter"  # folder in OUT
ABNORMAL = "Abnormal"  # the only finding of the classifier that filters normal images


def run_study(options: Options) -> dict[str, Any]:
    """Train `members` detectors for each preprocessing, score the test images with them, and compare the boxes of
    networks, ensembles and filters; returns the result.json.

    Raises:
        UserError: no test image has a box, and other mistakes in the input.
    """
    recipe, run, members, variants = options.recipe, options.run, options.members, options.preprocessing
    if members < 1:
        raise UserError(f"--members: expected 1 or more, got {members}")
    preprocessing.check_variants(variants, options.data, options.lungs)
    archive, out = begin(options, members * (1 + len(variants)))
    archive = phantoms_with_boxes(archive, out)
    resolved = resolve_environment(recipe, out, run)
    recipes = preprocessing.variants(variants, resolved, archive, options.lungs, out)
    data = preprocessing.shards_of_each(recipes, archive, out)
    plain = data[detection.PLAIN]
    held_out = ensemble.held_out(plain, recipe)
    if held_out is None or not isinstance(held_out.truth, BoxTruth):
        raise UserError(f"{plain}: no test or validation image has a box: use an archive that has such boxes")
    trained = train_all(recipes, range(members), data, out, run)
    runs = {name: score_seeds(trained, name, data[name], held_out.split, out) for name in recipes}
    detections = Detections.of(runs, held_out.truth)
    p_normal, filter_record = None, dict[str, Any]()
    if options.classifier != "none":
        of_filter = filter_recipe(options.classifier, archive.stored_size)
        p_normal, filter_record = filter_normal(of_filter, detections, archive, plain, run, held_out.split, out)
    fuse = detection.fusions(recipe.fusion_iou)
    results = detection.compare(detections, fuse, p_normal)
    summary = summarize(detections, held_out.split, members, filter_record.get("auroc"))
    return {
        **networks_record(trained, recipes, plain),
        "shards": data,
        "normal_filter": filter_record,
        **write(results, summary, out),
    }


# ---- The filter of normal images


def filter_recipe(name: str, stored_size: int) -> ClassifyRecipe:
    """The recipe of the classifier: a preset, or the defaults of its family on images that are no larger than the
    stored ones."""
    return preset(ClassifyRecipe, name) if name else ClassifyRecipe(size=min(ClassifyRecipe.size, stored_size))


def filter_normal(
    recipe: ClassifyRecipe,
    detections: Detections,
    archive: ArchiveOptions,
    plain: str,
    run: RunOptions,
    split: Split,
    out: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train a classifier of normal and abnormal images; each test image's probability (N,) of being normal, and the
    record for result.json.

    Args:
        plain: shards whose labels say which images are normal.
    """
    table = storage.join(out, FILTER, "labels.csv")
    storage.write_text(table, abnormal_labels(plain))
    labeled = replace(archive, labeling=replace(archive.labeling, labels=table, boxes=""))
    data = ensure_shards(labeled, storage.join(out, FILTER), recipe)
    recipe = resolve_environment(recipe, storage.join(out, FILTER), run)
    trained = train_all({FILTER: recipe}, (recipe.seed,), data, out, run)
    (scores,) = score_seeds(trained, FILTER, data, split, out)
    known = normal_probabilities(scores)
    p_normal = np.array([known.get(image_id, 0.0) for image_id in detections.image_ids])
    area = float(auroc(p_normal[:, None], detections.normal[:, None])[0])
    return p_normal, {"checkpoint": trained[0].checkpoint, "data": data, "auroc": area}


def abnormal_labels(data: str) -> str:
    """A table that says of each image of shards whether it shows any of their findings; blank if that is unknown."""
    info, rows = shards.read_info(data), list[Mapping[str, Any]]()
    for index, table in shard_index.read_index(info, [schema.IMAGE_ID, schema.LABELS]):
        labels_NF = shards.aligned_labels(table[schema.LABELS], index.findings, info.findings)
        some, none = (labels_NF == schema.POSITIVE).any(1), (labels_NF == schema.NEGATIVE).all(1)
        values = np.select([some, none], ["1", "0"], "").tolist()
        ids = table[schema.IMAGE_ID].to_pylist()
        rows += [{"image": image_id, ABNORMAL: value} for image_id, value in zip(ids, values, strict=True)]
    return csv_text(rows)


# ---- Results


def summarize(detections: Detections, split: Split, members: int, area: float | None) -> str:
    """The test images and networks in a sentence or two."""
    images = counted(len(detections.patients), f"{split} image")
    patients = counted(len(set(detections.patients)), "patient")
    normal = int((detections.normal == schema.POSITIVE).sum())
    boxes = counted(len(detections.true.image), "box", "boxes")
    text = f"{images} of {patients}, {normal} of them normal, with {boxes}; {counted(members, 'seed')}."
    return text if area is None else f"{text} The classifier of normal images has an AUROC of {area:.3f}."


def write(results: Sequence[DetectionResult], summary: str, out: str) -> dict[str, Any]:
    """Print the tables; write table.md, results.csv and map.png into `out`; metrics and URIs."""
    print(f"{detection_report.tables(results)}\n{summary}", flush=True)
    rows, picture = detection_report.csv(results), detection_report.picture(results)
    files = write_files(out, detection_report.page(results, summary), ("results.csv", rows), ("map.png", picture))
    return {"metrics": detection.metrics(results), **files}
