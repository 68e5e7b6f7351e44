"""What a run of any family says about each image, finding by finding, matched with the archive's ground truth.

A classifier says a probability; a detector the highest score of a finding's boxes; a segmentation model the area of
its mask as a share of the image. An image is positive if this value is at least the threshold.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import ImageRejectedError, UserError
from cxr.evaluation import detection_data, segmentation_data
from cxr.evaluation.classification_data import LabeledScores, join, known_labels, load_scores
from cxr.evaluation.decisions import BoxLimits
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.ground_truth_boxes import known_boxes
from cxr.evaluation.ground_truth_masks import known_masks
from cxr.evaluation.localization_data import load_scores as load_boxes
from cxr.evaluation.run import ReportOptions, Run, findings_of
from cxr.metrics import detection

MASK_LABELS = {"lungs": schema.LUNGS, "pneumothorax": schema.PNEUMOTHORAX}
CLASSIFIERS = ("aecnn", "attend", "classify", "localize")


def labeled_scores(run: Run, archive: str, options: ReportOptions) -> LabeledScores:
    """The values of all scored images of an archive that have labels.

    Raises:
        UserError: the family decides nothing, or no scored image has labels.
    """
    if run.family in CLASSIFIERS:
        columns = [schema.PATIENT_ID, schema.LABELS]
        manifest = read_truth(archive, options.reading, options.split, columns, options.labeling)
        manifest.print_notes()
        return join(load_scores(run), known_labels(manifest))
    if run.family == "detect":
        return _of_boxes(run, archive, options)
    if run.family in MASK_LABELS:
        return _of_masks(run, archive, options)
    raise UserError(
        f"{run.uri} is a run of family {run.family}, which makes no decisions: use the --out of cxr score with a "
        f"checkpoint of family {', '.join([*CLASSIFIERS, 'detect', *MASK_LABELS])}"
    )


def _of_boxes(run: Run, archive: str, options: ReportOptions) -> LabeledScores:
    truth = detection_data.one_truth(known_boxes(archive, options), options.labeling.reader_boxes)
    evaluation = detection_data.evaluate(load_boxes(run), findings_of(run), truth)
    count = len(evaluation.findings)
    values = detection.image_probabilities(evaluation.predicted, len(evaluation.rows), count)[:, :count]
    return LabeledScores(
        findings=evaluation.findings,
        rows=evaluation.rows,
        patients=evaluation.patients,
        probabilities=values,
        predicted_positive=values >= np.maximum(BoxLimits.of(run, evaluation.findings, options).scores, 1e-12),
        labels=detection.image_labels(evaluation.true, evaluation.known)[:, :count],
        images_with_error=evaluation.images_with_error,
        images_without_score=evaluation.images_without_score,
        images_without_labels=evaluation.images_without_boxes,
    )


def _of_masks(run: Run, archive: str, options: ReportOptions) -> LabeledScores:
    """The only finding is the label of the masks. Masks that cannot be read are unknown."""
    label = MASK_LABELS[run.family]
    truth, scores = known_masks(archive, options, label), segmentation_data.load_scores(run)
    places = pc.index_in(truth.image_ids, value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = places >= 0
    good = present & scores.good[places]
    rows = np.flatnonzero(good & truth.known)
    if not len(rows):
        raise segmentation_data.nothing_in_common(scores, truth, int(present.sum()), int(good.sum()))
    places = places[rows]
    labels = np.full((len(rows), 1), schema.UNKNOWN, np.int8)
    for at, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        try:
            mask, _ = truth.true_mask(row, *scores.sizes[place].tolist())
        except ImageRejectedError:
            continue
        labels[at] = schema.POSITIVE if mask.any() else schema.NEGATIVE
    shares = scores.areas_px[places] / scores.sizes[places].prod(1)
    return LabeledScores(
        findings=(label,),
        rows=rows,
        patients=truth.patients[rows],
        probabilities=shares[:, None],
        predicted_positive=shares[:, None] > 0,
        labels=labels,
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
        images_without_labels=int((good & ~truth.known).sum()),
    )
