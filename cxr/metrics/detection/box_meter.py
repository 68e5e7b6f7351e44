"""Boxes of a validation set: collected by each worker as tensors, gathered, and evaluated once, as in a report."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cxr.metrics.bootstrap import ratio
from cxr.metrics.detection.detection_summary import VOC_IOUS, coco_average_precisions, true_positives
from cxr.metrics.detection.precision import Curve, curves
from cxr.metrics.localization import Boxes
from cxr.metrics.meters import RankedCommunicator

_IMAGE, _FINDING, _SCORE, _CORNERS = 0, 1, 2, slice(3, 7)
_COLUMNS = 7


class BoxMeter:
    """Predicted and ground-truth boxes of all images that a worker has evaluated."""

    def __init__(self, device: torch.device) -> None:
        nothing = torch.zeros(0, _COLUMNS, device=device)
        self._predicted, self._true, self._images = [nothing], [nothing], 0

    def add(self, pred_BN6: Tensor, true_BM5: Tensor) -> None:
        """Add a batch of images, in a frame that preserves IoUs, such as fractions of the padded square.

        Args:
            pred_BN6: x_min, y_min, x_max, y_max, score, finding; padded with NaN.
            true_BM5: finding, x_min, y_min, x_max, y_max; padded with NaN.
        """
        corners, score, finding = pred_BN6.float().split([4, 1, 1], -1)
        self._predicted.append(self._rows(torch.cat([finding, score, corners], -1)))
        finding, corners = true_BM5.float().split([1, 4], -1)
        self._true.append(self._rows(torch.cat([finding, torch.zeros_like(finding), corners], -1)))
        self._images += len(pred_BN6)

    def _rows(self, boxes_BN6: Tensor) -> Tensor:
        """(K, 7) the boxes without padding, each after the number of its image."""
        numbers = torch.arange(self._images, self._images + len(boxes_BN6), device=boxes_BN6.device)
        numbered = torch.cat([numbers[:, None, None].expand_as(boxes_BN6[..., :1]).float(), boxes_BN6], -1)
        return numbered[~boxes_BN6[..., 0].isnan()]

    def results(self, workers: RankedCommunicator, findings: int) -> dict[str, float]:
        """map_40 and map_50 (PASCAL VOC 2010), map_50_95 (COCO), and precision and recall at the score with the
        highest mean F1 at IoU > .5.

        All are means over the findings that have ground-truth boxes; NaN if there are no ground-truth boxes.
        """
        predicted, true = (self._gathered(rows, workers) for rows in (self._predicted, self._true))
        boxed = np.unique(true.finding)
        results = {}
        of_iou: list[Curve] = []
        for iou in VOC_IOUS:
            of_iou = curves(predicted, true_positives(predicted, true, iou), true, findings)
            results[f"map_{100 * iou:.0f}"] = _mean(np.array([curve.voc_ap() for curve in of_iou])[boxed])
        results["map_50_95"] = _mean(coco_average_precisions(predicted, true, findings)[:, boxed])
        precision, recall = _at_best_f1([of_iou[finding] for finding in boxed])
        return results | {"precision": precision, "recall": recall}

    @staticmethod
    def _gathered(rows: list[Tensor], workers: RankedCommunicator) -> Boxes:
        """The boxes of all workers, by image. Images are numbered as if each worker had taken every n-th image."""
        own = torch.cat(rows)
        own[:, _IMAGE] = own[:, _IMAGE] * workers.size + workers.rank
        every = workers.gather(own).double().cpu().numpy()
        every = every[np.argsort(every[:, _IMAGE], kind="stable")]
        image, finding = every[:, _IMAGE].astype(np.int64), every[:, _FINDING].astype(np.int64)
        return Boxes(image, finding, every[:, _CORNERS], every[:, _SCORE])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _at_best_f1(of_findings: list[Curve]) -> tuple[float, float]:
    """Mean precision and recall at the score with the highest mean F1; NaN for both without a ground-truth box."""
    if not of_findings:
        return math.nan, math.nan
    scores = np.unique(np.concatenate([curve.scores for curve in of_findings]))
    if not len(scores):
        return 0.0, 0.0
    counts = [curve.counts_at(scores) for curve in of_findings]
    precision = np.mean([np.nan_to_num(ratio(right, right + wrong)) for right, wrong in counts], axis=0)
    recall = np.mean([right / curve.true for (right, _), curve in zip(counts, of_findings, strict=True)], axis=0)
    f1 = [2 * right / (right + wrong + c.true) for (right, wrong), c in zip(counts, of_findings, strict=True)]
    best = int(np.mean(f1, axis=0).argmax())
    return float(precision[best]), float(recall[best])
