"""An ensemble compared with its members by their scores of one split of shards, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr import schema
from cxr.data import shards
from cxr.evaluation import classification_data, detection_data, localization_data, segmentation_data
from cxr.evaluation.classification_data import LabelTruth, known_labels
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.ground_truth_masks import MaskTruth, known_masks
from cxr.evaluation.run import ReportOptions, Run, Split, findings_of
from cxr.families.base import Recipe
from cxr.metrics.bootstrap import RESAMPLES, Intervals, column_means, intervals, resampled_means
from cxr.metrics.classification import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.metrics.detection import VOC_IOUS, average_precisions, true_positives
from cxr.metrics.detection.precision import resampled_aps
from cxr.metrics.segmentation import dice
from cxr.reporting.tables import interval, markdown, number

IOU = VOC_IOUS[0]
AUROC, AP, DICE = "mean_auroc", "map_40", "dice"
_TITLES = {AUROC: "AUROC", AP: f"AP (VOC 2010) at IoU > {IOU:g}", DICE: "Dice"}
_LEGEND = (
    "Intervals are 95 % intervals from resampling patients; the networks are fixed. The best member is selected on "
    "these same images, so the gain over it is underestimated.\n"
)


@dataclass(frozen=True)
class HeldOut:
    """The ground truth of images on which networks are compared."""

    split: Split
    truth: LabelTruth | BoxTruth | MaskTruth
    findings: tuple[str, ...]
    """F that the metric is measured for; the label of the masks for Dice."""

    @property
    def metric(self) -> str:
        return AUROC if isinstance(self.truth, LabelTruth) else AP if isinstance(self.truth, BoxTruth) else DICE


@dataclass(frozen=True)
class _Measured:
    """The metric of a network."""

    value: np.ndarray  # (F,)
    resampled: np.ndarray  # (R, F) in each resample of patients
    patients: np.ndarray  # (N,) of the images


@dataclass(frozen=True)
class EnsembleComparison:
    """The metric of an ensemble and of each of its members on the same images."""

    metric: str
    findings: tuple[str, ...]
    split: str
    images: int
    patients: int
    members: Mapping[str, Intervals]
    ensemble: Intervals
    best: str  # the member with the highest mean
    gain: Intervals  # of the ensemble over the best member

    def describe(self) -> dict[str, Any]:
        """As plain JSON."""
        facts = {"split": self.split, "images": self.images, "patients": self.patients, "metric": self.metric}
        return {
            **facts,
            "members": {name: self._described(of) for name, of in self.members.items()},
            "ensemble": self._described(self.ensemble),
            "best_member": self.best,
            "gain": self._described(self.gain),
        }

    def _described(self, of: Intervals) -> dict[str, Any]:
        mean = {"mean": of.mean, "low": of.mean_low, "high": of.mean_high}
        return {**mean, "findings": dict(zip(self.findings, of.value.tolist(), strict=True))}

    def table(self) -> str:
        """Markdown: one row per network, with the mean and its interval, and the value of each finding."""
        several = list(self.findings) if len(self.findings) > 1 else []
        networks = [*self.members.items(), ("ensemble", self.ensemble)]
        rows = [
            [name, interval(of.mean, of.mean_low, of.mean_high), *(map(number, of.value) if several else ())]
            for name, of in networks
        ]
        head = [_TITLES[self.metric], "mean" if several else "".join(self.findings), *several]
        gain = interval(self.gain.mean, self.gain.mean_low, self.gain.mean_high)
        return f"{markdown(head, rows)}\nThe ensemble gains {gain} over {self.best}.\n{_LEGEND}"


def held_out(data: str, recipe: Recipe) -> HeldOut | None:
    """The ground truth for scores of `recipe`: of the test split of shards, or else of the val split; None if neither
    has any."""
    info = shards.read_info(data)
    splits: tuple[Split, ...] = ("test", "val")
    found = (_truth(data, split, recipe) for split in splits if info.rows(split))
    return next((truth for truth in found if truth.findings), None)


def _truth(data: str, split: Split, recipe: Recipe) -> HeldOut:
    options = ReportOptions(split=split)
    if schema.PROBABILITIES in recipe.score_columns.names:
        manifest = read_truth(data, options.reading, split, [schema.PATIENT_ID, schema.LABELS])
        labels = known_labels(manifest)
        return HeldOut(split, labels, with_both_classes(labels))
    if schema.PRED_BOXES in recipe.score_columns.names:
        boxes = detection_data.one_truth(known_boxes(data, options), options.labeling.reader_boxes)
        boxed = detection_data.named(boxes)
        return HeldOut(split, boxes, tuple(finding for finding in boxes.labels.findings if finding in boxed))
    masks = known_masks(data, options, recipe.mask_label)
    return HeldOut(split, masks, (recipe.mask_label,) if masks.known.any() else ())


def with_both_classes(truth: LabelTruth) -> tuple[str, ...]:
    """The findings with both positive and negative images."""
    classes = ({*column} & {schema.POSITIVE, schema.NEGATIVE} for column in truth.labels.T.tolist())
    return tuple(finding for finding, known in zip(truth.findings, classes, strict=True) if len(known) == 2)


def compare(
    members: Mapping[str, Run], ensemble: Run, images: HeldOut, *, resamples: int = RESAMPLES, seed: int = 0
) -> EnsembleComparison:
    """Compare the scores of the ensemble with those of each member, on the same images.

    Raises:
        UserError: there are no scores of these images.
    """
    by_member = {name: _measured(run, images, resamples, seed) for name, run in members.items()}
    whole = _measured(ensemble, images, resamples, seed)
    best = max(by_member, key=lambda name: by_member[name].value.mean())
    gain = whole.value - by_member[best].value, whole.resampled - by_member[best].resampled
    return EnsembleComparison(
        metric=images.metric,
        findings=images.findings,
        split=images.split,
        images=len(whole.patients),
        patients=len(np.unique(whole.patients)),
        members={name: intervals(of.value, of.resampled) for name, of in by_member.items()},
        ensemble=intervals(whole.value, whole.resampled),
        best=best,
        gain=intervals(*gain),
    )


def _measured(run: Run, images: HeldOut, resamples: int, seed: int) -> _Measured:
    truth = images.truth
    if isinstance(truth, LabelTruth):
        joined = classification_data.join(classification_data.load_scores(run), truth)
        known = joined.at(joined.rows, images.findings)
        resampled = resampled_aurocs(known.probabilities, known.labels, known.patients, resamples, seed)
        return _Measured(auroc(known.probabilities, known.labels), resampled, known.patients)
    if isinstance(truth, BoxTruth):
        scores, scored = localization_data.load_scores(run), findings_of(run)
        boxes = detection_data.evaluate(scores, scored, truth)
        columns, count = [boxes.findings.index(finding) for finding in images.findings], len(boxes.findings)
        value = average_precisions(boxes.predicted, boxes.true, count, IOU)
        correct = true_positives(boxes.predicted, boxes.true, IOU)
        resampled = resampled_aps(boxes.predicted, correct, boxes.true, boxes.patients, count, resamples, seed)
        return _Measured(value[columns], resampled[:, columns], boxes.patients)
    masks = segmentation_data.evaluate(segmentation_data.load_scores(run), truth)
    values_N1 = dice(masks.overlap).numpy()[:, None]
    resampled = resampled_means(values_N1, masks.patients, resamples, seed)
    return _Measured(column_means(values_N1), resampled, masks.patients)
