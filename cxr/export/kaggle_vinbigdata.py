"""Submissions to VinBigData Chest X-ray Abnormalities Detection (Kaggle, 2020) from a scoring run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.boxes import ScoredBoxes, add_no_finding
from cxr.data import shards
from cxr.errors import UserError
from cxr.evaluation import classification_data, localization_data
from cxr.evaluation.run import Run, Split, check_family
from cxr.metrics.localization import Boxes
from cxr.reporting.tables import csv_text
from cxr.sources import vinbigdata
from cxr.sources.image_files import image_key
from cxr.wording import counted

BOX_FAMILIES = ("detect", "attend", "localize")
CLASSIFIERS = ("aecnn", "attend", "classify", "localize")
_NORMAL = f"{schema.NO_FINDING_CLASS} 1 0 0 1 1"


@dataclass(frozen=True)
class NormalFilter:
    """Filter of images that are probably normal; see `boxes.add_no_finding`."""

    p_normal: Mapping[str, float]  # by image id
    low: float
    high: float


def normal_probabilities(run: Run) -> dict[str, float]:
    """By image id: a classifier's probability of "No finding", or one minus its highest probability of any finding.

    Raises:
        UserError: the run is no classifier's.
    """
    check_family(run, CLASSIFIERS, "the filter for normal images")
    scores = classification_data.load_scores(run)
    if schema.NO_FINDING in scores.findings:
        normal = scores.probabilities[:, scores.findings.index(schema.NO_FINDING)]
    else:
        normal = 1 - scores.probabilities.max(1, initial=0)
    ids = scores.image_ids.to_pylist()
    return {ids[row]: float(normal[row]) for row in np.flatnonzero(scores.good).tolist()}


def write_submission(run: Run, uri: str, normal: NormalFilter | None = None, split: Split = "test") -> dict[str, int]:
    """Write a row for each image of a split to `uri`, sorted by image_id; returns counts.

    image_id is the file's name without folders and ending. Of the test split, only the challenge's own test images
    are written: images that train.csv lists are left out and counted, unless there are no others.

    The challenge requires every image. Images without boxes, or with an error, are submitted as normal.
    Boxes are brought to the originals' pixels, where the archive that was scored holds copies and tells the sizes of
    the originals, and rounded; where nothing tells them, an image that is no DICOM is counted. Boxes of findings that
    are not VinBigData's are left out and counted.

    Raises:
        UserError: the run finds no boxes, none of VinBigData's findings, or has no image of that split; two images
            have the same name; or the filter does not know an image.
    """
    check_family(run, BOX_FAMILIES, "a submission to VinBigData")
    of_split = localization_data.load_scores(run, split)
    scores = _without_listed(of_split, run) if split == "test" else of_split
    scales, of_unknown_size = _to_originals(scores, run)
    predicted, left_out = _predicted_boxes(scores, run, scales)
    rows: dict[str, str] = {}
    for image_id, good, boxes in zip(scores.image_ids.to_pylist(), scores.good.tolist(), predicted, strict=True):
        name = image_key(image_id)
        if name in rows:
            raise UserError(f"{run.uri} has scored two images named {name}: score the challenge's archive by itself")
        rows[name] = prediction(_filtered(boxes, image_id, normal)) if good else _NORMAL
    table: list[dict[str, Any]] = [{"image_id": name, "PredictionString": rows[name]} for name in sorted(rows)]
    storage.write_text(storage.normalize(uri), csv_text(table))
    return {
        "images": len(rows),
        "normal": sum(row == _NORMAL for row in rows.values()),
        "training_images_left_out": len(of_split.good) - len(scores.good),
        "boxes_left_out": left_out,
        "of_unknown_size": of_unknown_size,
        "errors": int((~scores.good).sum()),
    }


def _without_listed(scores: localization_data.BoxScores, run: Run) -> localization_data.BoxScores:
    """The scores of images that train.csv of the scored archive does not list; all where it lists all."""
    listed = {name for archive in shards.made_of(run.archive) for name in vinbigdata.listed(archive)}
    own = np.array([image_key(image_id) not in listed for image_id in scores.image_ids.to_pylist()], bool)
    return scores.at(own) if own.any() else scores


def _to_originals(scores: localization_data.BoxScores, run: Run) -> tuple[np.ndarray, int]:
    """(N, 2) what boxes are to be multiplied by in x and y; and of how many images with boxes that is not known."""
    sizes: dict[str, list[int]] = {}
    for archive in run.archives:
        for raw in shards.made_of(archive):
            table = vinbigdata.original_px(raw)
            sizes |= dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    originals = np.array(
        [sizes.get(image_key(image_id), [np.nan] * 2)[::-1] for image_id in scores.image_ids.to_pylist()]
    )
    scales = originals.reshape(-1, 2) / np.maximum(scores.sizes_px, 1)
    has_size = np.logical_and.reduce(np.isfinite(scales), axis=1)
    boxed = pc.list_value_length(scores.boxes).fill_null(0).to_numpy() > 0
    dicom = np.array([(uri or "").lower().endswith(vinbigdata.DICOM) for uri in scores.source_uris.to_pylist()], bool)
    return np.where(has_size[:, None], scales, 1), int((boxed & ~has_size & ~dicom).sum())


def _predicted_boxes(
    scores: localization_data.BoxScores, run: Run, scales: np.ndarray
) -> tuple[list[ScoredBoxes], int]:
    """Of each image its boxes of VinBigData's findings, best score first, and how many boxes of others there are."""
    flat = Boxes.of(scores.boxes, schema.VINBIGDATA_FINDINGS)
    every = pc.sum(pc.list_value_length(scores.boxes)).as_py() or 0
    if every and not len(flat.image):
        raise UserError(
            f"{run.uri} has {counted(every, 'box', 'boxes')}, but none for VinBigData's findings: train the detector "
            f"on VinBigData's annotations"
        )
    return flat.scaled(*scales.T).by_image(len(scores.good)), every - len(flat.image)


def _filtered(boxes: ScoredBoxes, image_id: str, normal: NormalFilter | None) -> ScoredBoxes:
    if normal is None:
        return boxes
    if image_id not in normal.p_normal:
        raise UserError(f"the classifier's run has no score of {image_id}: score the same archive with it")
    return add_no_finding(boxes, normal.p_normal[image_id], normal.low, normal.high)


def prediction(boxes: ScoredBoxes) -> str:
    """`class confidence x_min y_min x_max y_max` of each box in turn; without boxes, the entry of a normal image."""
    edges = np.rint(boxes.boxes).astype(int).tolist()
    words = [
        f"{label} {score:.6g} {' '.join(map(str, box))}"
        for label, score, box in zip(boxes.labels.tolist(), boxes.scores.tolist(), edges, strict=True)
    ]
    return " ".join(words) or _NORMAL
