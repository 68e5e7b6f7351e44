"""Found boxes judged by the code of Ultralytics' validator: precision, recall, mean average precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from cxr.models.yolo import ultralytics

OVERLAPS = torch.linspace(0.5, 0.95, 10)  # IoUs at which a box counts as found
ROW = 2 + len(OVERLAPS)
_SIDE_PX = 1024.0  # of the square in which overlaps are computed


def judged_rows(found_BN6: Tensor, true_BM5: Tensor) -> Tensor:
    """A row for each found box, (K, 12): its score, its finding, and for each of `OVERLAPS` 1 if it is right, else 0.

    A true box is found once, by the box of its finding with the best score that overlaps it enough.

    Args:
        found_BN6: x_min, y_min, x_max, y_max as shares, score, finding; best score first, NaN behind them.
        true_BM5: finding, x_min, y_min, x_max, y_max as shares; NaN: no box.
    """
    judge = ultralytics("engine.validator").BaseValidator.match_predictions
    iou = ultralytics("utils.metrics").box_iou
    rows = [found_BN6.new_zeros(0, ROW)]
    for found, true in zip(found_BN6, true_BM5, strict=True):
        found, true = found[~found[:, 4].isnan()], true[~true[:, 0].isnan()]
        overlap = iou(true[:, 1:] * _SIDE_PX, found[:, :4] * _SIDE_PX)
        right = judge(SimpleNamespace(iouv=OVERLAPS), found[:, 5], true[:, 0], overlap).to(found)
        rows.append(torch.cat([found[:, 4:], right], 1))
    return torch.cat(rows)


def summary(rows_KR: Tensor, true_T: Tensor, findings: int) -> dict[str, float]:
    """precision and recall at the score with the best mean F1, map50, map50_95: means over findings that have boxes.

    Args:
        rows_KR: what `judged_rows` gave of all images.
        true_T: the finding of each true box of these images.

    NaN throughout where there is no true box.
    """
    metrics = ultralytics("utils.metrics").DetMetrics({i: str(i) for i in range(findings)})
    rows, true = rows_KR.cpu().numpy(), true_T.cpu().numpy()
    metrics.stats = {
        "tp": [rows[:, 2:]],
        "conf": [rows[:, 0]],
        "pred_cls": [rows[:, 1]],
        "target_cls": [true],
        "target_img": [true],
    }
    names = ("precision", "recall", "map50", "map50_95")
    if not len(true):
        return dict.fromkeys(names, math.nan)
    metrics.process()
    return dict(zip(names, map(float, metrics.mean_results()), strict=True))
