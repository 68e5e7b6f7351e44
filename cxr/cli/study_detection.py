"""The study of detection: preprocessing, size of ensembles, fusion, and the filter for normal images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.benchmarks.studies import detection, detection_report
from cxr.benchmarks.studies.detection import DetectionResult, Detections
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli.ensembles import score_all, score_seeds
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import IMAGE, begin, check_options, held_out, networks_record, write_files
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.data import shard_index, shards
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.run import Split
from cxr.export.kaggle_vinbigdata import normal_probabilities
from cxr.families.classify import ClassifyRecipe
from cxr.families.presets import preset
from cxr.metrics.classification.ranking import auroc
from cxr.sources.options import NO_COLUMN, Labeling
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
        UserError: no test or validation image has a box, and other mistakes in the input.
    """
    recipe, run, members, variants = options.recipe, options.run, options.members, options.preprocessing
    check_options(options.data, members, "--members")
    preprocessing.check_variants(variants, recipe, options.data, options.lungs)
    of_filter = filter_recipe(options.classifier, options.data.stored_size)
    archive, out = begin(options, members * (1 + len(variants)) + bool(of_filter))
    archive = phantoms_with_boxes(archive, out)
    recipe = resolve_environment(recipe, out, run)
    plain = preprocessing.plain_shards(recipe, archive, out)
    images = held_out(plain, recipe, "a box")
    assert isinstance(images.truth, BoxTruth)
    recipes = preprocessing.variants(variants, recipe, archive, options.lungs, out)
    data = preprocessing.shards_of_each(recipes, plain, archive, out)
    normal_filter = of_filter and train_filter(of_filter, archive, plain, run, out)
    trained = train_all(recipes, range(members), data, out, run, reading=archive.reading)
    runs = {name: score_seeds(trained, name, data[name], images.split, out) for name in recipes}
    detections = Detections.of(runs, images.truth)
    p_normal, area = normal_filter.applied(detections, images.split, out) if normal_filter else (None, None)
    fuse = detection.fusions(recipe.fusion_iou)
    results = detection.compare(detections, fuse, p_normal)
    summary = summarize(detections, images.split, members, area)
    return {
        **networks_record(trained, recipes, plain),
        "shards": data,
        "normal_filter": {**asdict(normal_filter), "auroc": area} if normal_filter else {},
        **write(results, summary, out),
    }


# ---- The filter for normal images


@dataclass(frozen=True)
class FilterClassifier:
    """A trained classifier of normal and abnormal images."""

    checkpoint: str
    data: str
    """Shards that it was trained on, with the images of the detectors."""

    def applied(self, detections: Detections, split: Split, out: str) -> tuple[np.ndarray, float]:
        """Each image's probability (N,) of being normal, and their AUROC; the cluster scores the images in OUT."""
        (scores,) = score_all(
            {FILTER: self.checkpoint}, self.data, split, storage.join(out, FILTER, "scored")
        ).values()
        known = normal_probabilities(scores)
        p_normal = np.array([known.get(image_id, 0.0) for image_id in detections.image_ids])
        return p_normal, float(auroc(p_normal[:, None], detections.normal[:, None])[0])


def filter_recipe(name: str, stored_size: int) -> ClassifyRecipe | None:
    """The recipe of the classifier: a preset, or the defaults of its family on images that are no larger than the
    stored ones; None for "none".

    Raises:
        UserError: there is no such preset, or it needs larger images.
    """
    if name == "none":
        return None
    if not name:
        return ClassifyRecipe(size=min(ClassifyRecipe.size, stored_size))
    recipe = preset(ClassifyRecipe, name)
    if recipe.size > stored_size:
        raise UserError(
            f"--classifier {name}: expected stored images of at least {recipe.size} px, got {stored_size} px: raise "
            f"--stored-size, or use another preset"
        )
    return recipe


def train_filter(
    recipe: ClassifyRecipe, archive: ArchiveOptions, plain: str, run: RunOptions, out: str
) -> FilterClassifier:
    """Train the classifier on the training images of the detectors.

    Args:
        plain: shards whose labels say which images are normal.
    """
    folder = storage.join(out, FILTER)
    labeling = filter_labeling(plain, storage.join(folder, "labels.parquet"))
    data = ensure_shards(replace(archive, labeling=labeling), folder, recipe)
    recipe = resolve_environment(recipe, folder, run)
    (trained,) = train_all({FILTER: recipe}, (recipe.seed,), data, out, run, reading=archive.reading)
    return FilterClassifier(trained.checkpoint, data)


def filter_labeling(data: str, uri: str) -> Labeling:
    """Write the `abnormal_labels` of shards to `uri`; how to read them, with the splits of the shards.

    Raises:
        UserError: there are not both normal and abnormal images to train on, and to validate with.
    """
    table = abnormal_labels(data)
    for split in ("train", "val"):
        found = set(table.filter(pc.field("split") == split)[ABNORMAL].to_pylist())
        if not found >= {"0", "1"}:
            raise UserError(
                f"{data}: expected normal and abnormal images in the {split} split, on which the filter for normal "
                f"images is trained, got only one kind: use --classifier none"
            )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(uri, sink.getvalue())
    return Labeling(
        labels=uri, image_column="image", patient_column=NO_COLUMN, split_column="split", label_columns=(ABNORMAL,)
    )


def abnormal_labels(data: str) -> pa.Table:
    """The split of each image of shards, and whether the image shows any of their findings: 1, 0, or blank if that is
    unknown."""
    info, parts = shards.read_info(data), list[pa.Table]()
    for index, table in shard_index.read_index(info, [schema.IMAGE_ID, schema.SPLIT, schema.LABELS]):
        labels_NF = shards.aligned_labels(table[schema.LABELS], index.findings, info.findings)
        some, none = (labels_NF == schema.POSITIVE).any(1), (labels_NF == schema.NEGATIVE).all(1)
        values = pa.array(np.select([some, none], ["1", "0"], ""))
        parts.append(pa.table({"image": table[schema.IMAGE_ID], "split": table[schema.SPLIT], ABNORMAL: values}))
    return pa.concat_tables(parts)


# ---- Results


def summarize(detections: Detections, split: Split, members: int, area: float | None) -> str:
    """The test images and networks in a sentence or two."""
    images = counted(len(detections.patients), IMAGE[split])
    patients = counted(len(set(detections.patients)), "patient")
    normal = int((detections.normal == schema.POSITIVE).sum())
    boxes = counted(len(detections.true.image), "box", "boxes")
    text = f"{images} of {patients}, {normal} of them normal, with {boxes}; {counted(members, 'seed')}."
    measured = area is not None and math.isfinite(area)
    return f"{text} The classifier of normal images has an AUROC of {area:.3f}." if measured else text


def write(results: Sequence[DetectionResult], summary: str, out: str) -> dict[str, Any]:
    """Print the tables; write table.md, results.csv and map.png into `out`; metrics and URIs."""
    print(f"{detection_report.tables(results)}\n{summary}", flush=True)
    rows, picture = detection_report.csv(results), detection_report.picture(results)
    files = write_files(out, detection_report.page(results, summary), ("results.csv", rows), ("map.png", picture))
    return {"metrics": detection.metrics(results), **files}
