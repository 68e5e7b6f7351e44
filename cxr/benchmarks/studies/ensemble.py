"""An ensemble compared with its members on one split of shards, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cxr import schema
from cxr.benchmarks.studies import boxed_xrays
from cxr.benchmarks.studies.boxed_xrays import StoredXRays
from cxr.benchmarks.studies.xrays import patients_of
from cxr.data import shards
from cxr.data.batch import HAS_MASK, to_columns
from cxr.families.base import Recipe
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import RESAMPLES, Intervals, column_means, intervals, resampled_means
from cxr.metrics.classification import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.metrics.detection import VOC_IOUS, average_precisions, true_positives
from cxr.metrics.detection.precision import resampled_aps
from cxr.metrics.localization import Boxes
from cxr.metrics.segmentation import dice, overlap_rows
from cxr.reporting.tables import interval, markdown, number
from cxr.sources import rle

IOU = VOC_IOUS[0]
AUROC, AP, DICE = "mean_auroc", "map_40", "dice"
_TITLES = {AUROC: "AUROC", AP: f"AP (VOC 2010) at IoU > {IOU:g}", DICE: "Dice"}
_LEGEND = (
    "Intervals are 95 % intervals from resampling patients; the networks are fixed. The best member is selected on "
    "these same images, so the gain over it is underestimated.\n"
)


@dataclass(frozen=True)
class Truth:
    """What the images of a split show, for the metric that suits the scores of a family."""

    metric: str
    findings: tuple[str, ...]  # F that the metric is measured for; the label of the masks for Dice
    columns: np.ndarray  # (F,) their indices in the archive
    masks: np.ndarray | None = None  # (N, S, S) bool, for Dice
    known: np.ndarray | None = None  # (N,) bool: whether the mask is known


@dataclass(frozen=True)
class HeldOut:
    """Images on which networks are compared."""

    split: str
    xrays: StoredXRays
    truth: Truth


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


def held_out(data: str, recipe: Recipe, limit: int = 0) -> HeldOut | None:
    """The images to compare networks of `recipe` on: of the test split, or else of the val split; None if neither has
    a ground truth for their scores.

    Args:
        limit: maximum number of images, spread evenly; 0 for all.
    """
    info = shards.read_info(data)
    for split in ("test", "val"):
        if info.rows(split):
            xrays = boxed_xrays.read_stored(data, split, limit)
            truth = _truth(xrays, recipe)
            if truth.findings:
                return HeldOut(split, xrays, truth)
    return None


def _truth(xrays: StoredXRays, recipe: Recipe) -> Truth:
    if schema.PROBABILITIES in recipe.score_columns.names:
        both = [len({*column} & {schema.POSITIVE, schema.NEGATIVE}) == 2 for column in xrays.labels.T.tolist()]
        return Truth(AUROC, *_chosen(xrays, np.flatnonzero(both)))
    if schema.PRED_BOXES in recipe.score_columns.names:
        return Truth(AP, *_chosen(xrays, np.array(xrays.boxed(), int)))
    columns = to_columns(xrays.rows, (schema.MASKS,), xrays.pixels, recipe.mask_label)
    known, size = columns[HAS_MASK], xrays.pixels.size
    masks = np.unpackbits(columns[schema.MASKS], axis=1, count=size**2).reshape(-1, size, size) == 1
    return Truth(DICE, (recipe.mask_label,) if known.any() else (), np.zeros(1, int), masks, known)


def _chosen(xrays: StoredXRays, columns: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    return tuple(xrays.findings[column] for column in columns), columns


def compare(
    members: Mapping[str, Checkpoint],
    ensemble: Checkpoint,
    images: HeldOut,
    device: torch.device,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> EnsembleComparison:
    """Score the images with each network, as scoring does, and compare.

    Raises:
        UserError: the images are smaller than a network needs.
    """
    patients_N = patients_of(images.xrays.rows)

    def measured(network: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
        return _measured(_scores(network, images, device), images, patients_N, resamples, seed)

    by_member = {name: measured(member) for name, member in members.items()}
    value_F, resampled_RF = measured(ensemble)
    best = max(by_member, key=lambda name: by_member[name][0].mean())
    return EnsembleComparison(
        metric=images.truth.metric,
        findings=images.truth.findings,
        split=images.split,
        images=images.xrays.rows.num_rows,
        patients=len(np.unique(patients_N)),
        members={name: intervals(*of) for name, of in by_member.items()},
        ensemble=intervals(value_F, resampled_RF),
        best=best,
        gain=intervals(value_F - by_member[best][0], resampled_RF - by_member[best][1]),
    )


def _scores(network: Checkpoint, images: HeldOut, device: torch.device) -> pa.Table:
    """Scores of the images; masks in the frame of the stored images."""
    return images.xrays.scored(network, device, as_stored=images.truth.metric == DICE)


def _measured(
    scores: pa.Table, images: HeldOut, patients_N: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The metric of each finding (F,), and in each resample of patients (R, F)."""
    truth, xrays = images.truth, images.xrays
    if truth.metric == AUROC:
        probabilities = np.array(scores[schema.PROBABILITIES].to_pylist())[:, truth.columns]
        labels = xrays.labels[:, truth.columns]
        return auroc(probabilities, labels), resampled_aurocs(probabilities, labels, patients_N, resamples, seed)
    if truth.metric == AP:
        boxes, count = Boxes.of(scores[schema.PRED_BOXES], xrays.findings), len(xrays.findings)
        boxes, true = boxes.at(xrays.known[boxes.image, boxes.finding]), xrays.true
        value = average_precisions(boxes, true, count, IOU)
        correct = true_positives(boxes, true, IOU)
        resampled = resampled_aps(boxes, correct, true, patients_N, count, resamples, seed)
        return value[truth.columns], resampled[:, truth.columns]
    assert truth.masks is not None
    assert truth.known is not None
    size = xrays.pixels.size
    predicted = np.stack([rle.decode(code, size, size) for code in scores[schema.PRED_MASK_RLE].to_pylist()])
    of_images = dice(overlap_rows(torch.from_numpy(predicted), torch.from_numpy(truth.masks))).numpy()
    values_N1 = np.where(truth.known, of_images, np.nan)[:, None]
    return column_means(values_N1), resampled_means(values_N1, patients_N, resamples, seed)
