"""All metrics of predicted boxes on one set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES, Intervals, intervals
from cxr.metrics.detection.candidate_pairs import pairs
from cxr.metrics.detection.matching import coco_true_positives, voc_true_positives
from cxr.metrics.detection.precision import Curve, curves, resampled_aps
from cxr.metrics.localization import Boxes

VOC_IOUS = (0.4, 0.5)  # VinBigData's, and VOC's own
FROC_RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # false positives per image (LUNA16, Setio et al. 2017)
COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())


@dataclass(frozen=True)
class DetectionSummary:
    """Metrics by finding, in the order of the findings; NaN for a finding without ground-truth boxes, which means
    ignore."""

    findings: tuple[str, ...]
    true: np.ndarray  # (F,) boxes
    true_images: np.ndarray  # (F,) with such a box
    predicted: np.ndarray  # (F,) boxes
    voc: dict[float, Intervals]  # IoU -> average precision with its interval by patient, and the mean
    coco: np.ndarray  # (T, F) average precision at each of COCO_IOUS
    curves: list[Curve]  # at the first of VOC_IOUS
    images: int
    known_images: np.ndarray  # (F,) of these, in which all boxes of the finding are known
    patients: int

    @property
    def without_truth(self) -> list[str]:
        """Findings that the means leave out."""
        return [finding for finding, count in zip(self.findings, self.true, strict=True) if not count]

    @property
    def froc(self) -> np.ndarray:
        """(F, R) sensitivity of each finding at FROC_RATES false positives per image in which it is known; NaN
        without ground-truth boxes."""
        known = zip(self.curves, self.known_images.tolist(), strict=True)
        rates = [[curve.sensitivity_at(rate * images) for rate in FROC_RATES] for curve, images in known]
        return np.array(rates, np.float64).reshape(len(self.findings), len(FROC_RATES))

    @property
    def mean_froc(self) -> float:
        """Mean over FROC_RATES and the findings with ground-truth boxes."""
        measured = self.froc[self.true > 0]
        return float(measured.mean()) if measured.size else float("nan")

    @property
    def map_50_95(self) -> float:
        """Mean over COCO's IoUs and the findings with ground-truth boxes."""
        measured = self.coco[:, self.true > 0]
        return float(measured.mean()) if measured.size else float("nan")


def true_positives(predicted: Boxes, true: Boxes, iou: float) -> np.ndarray:
    """(M,) bool: which predicted boxes are true positives, see `matching.voc_true_positives`."""
    return voc_true_positives(predicted, pairs(predicted, true), iou)


def missed_boxes(predicted: Boxes, true: Boxes, iou: float) -> np.ndarray:
    """(K,) bool: ground-truth boxes that no predicted box is a true positive of, see
    `matching.voc_true_positives`."""
    candidates = pairs(predicted, true)
    best = candidates.best()
    best = best.at(best.iou > iou)
    missed = np.ones(len(true.score), bool)
    missed[best.true[voc_true_positives(predicted, candidates, iou)[best.predicted]]] = False
    return missed


def average_precisions(predicted: Boxes, true: Boxes, findings: int, iou: float) -> np.ndarray:
    """(F,) of PASCAL VOC 2010 at IoU > `iou`; NaN without ground-truth boxes."""
    true_positive = true_positives(predicted, true, iou)
    return np.array([curve.voc_ap() for curve in curves(predicted, true_positive, true, findings)])


def coco_average_precisions(
    predicted: Boxes, true: Boxes, findings: int, ious: Sequence[float] = COCO_IOUS
) -> np.ndarray:
    """(T, F) of COCO at IoU >= each of `ious`; NaN without ground-truth boxes."""
    true_positive, seen = coco_true_positives(predicted, true, ious)
    some = predicted.at(seen)
    return np.array([[c.coco_ap() for c in curves(some, of[seen], true, findings)] for of in true_positive])


def paired_gain(
    predicted: Boxes,
    compared: Boxes,
    true: Boxes,
    patients_N: np.ndarray,
    findings: int,
    *,
    iou: float = VOC_IOUS[0],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """VOC's average precisions of `predicted` minus those of `compared`, on the same images and resamples."""
    true_positive = [(some, true_positives(some, true, iou)) for some in (predicted, compared)]
    values, baseline = (np.array([curve.voc_ap() for curve in curves(*of, true, findings)]) for of in true_positive)
    sampled, sampled_baseline = (
        resampled_aps(*of, true, patients_N, findings, resamples, seed) for of in true_positive
    )
    return intervals(values - baseline, sampled - sampled_baseline)


def summarize(
    predicted: Boxes,
    true: Boxes,
    patients_N: np.ndarray,
    findings: Sequence[str],
    *,
    known_NF: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> DetectionSummary:
    """Evaluate predicted boxes with scores. Both sets are in the same frame; `image` indexes `patients_N`.

    Args:
        known_NF: bool: all boxes of a finding in an image are known, so that others are false positives; where they
            are not, there are neither true nor predicted boxes. None: all are.
    """
    candidates, count = pairs(predicted, true), len(findings)
    true_positive = {iou: voc_true_positives(predicted, candidates, iou) for iou in VOC_IOUS}
    some = np.unique(true.image * count + true.finding) % max(1, count)
    return DetectionSummary(
        findings=tuple(findings),
        true=np.bincount(true.finding, minlength=count),
        true_images=np.bincount(some, minlength=count),
        predicted=np.bincount(predicted.finding, minlength=count),
        voc={
            iou: intervals(
                np.array([curve.voc_ap() for curve in curves(predicted, of, true, count)]),
                resampled_aps(predicted, of, true, patients_N, count, resamples, seed),
            )
            for iou, of in true_positive.items()
        },
        coco=coco_average_precisions(predicted, true, count),
        curves=curves(predicted, true_positive[VOC_IOUS[0]], true, count),
        images=len(patients_N),
        known_images=np.full(count, len(patients_N)) if known_NF is None else known_NF.sum(0),
        patients=len(np.unique(patients_N)),
    )
