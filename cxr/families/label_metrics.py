"""How well findings are told on validation images, and the thresholds that are chosen there."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cxr.metrics import classification


class Teller(Protocol):
    """A network with a probability of each finding and a threshold for it, (F,)."""

    findings: tuple[str, ...]
    thresholds: Tensor


def judge(network: Teller, scores_NF: Tensor, labels_NF: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of probabilities beside labels as in `schema.LABELS`; the thresholds, described, put into `network`.

    mean_auroc and mean_ap are means over the `findings_measured`, those with both classes, NaN where there is none;
    auroc/FINDING is each one's.
    """
    scores, labels = scores_NF.cpu().numpy(), labels_NF.cpu().numpy()
    chosen = classification.choose_thresholds(scores, labels)
    network.thresholds.copy_(torch.from_numpy(chosen.values))
    areas, precisions = classification.auroc(scores, labels), classification.average_precision(scores, labels)
    measured = ~np.isnan(areas)
    metrics = {
        "mean_auroc": _mean(areas[measured]),
        "mean_ap": _mean(precisions[measured]),
        "findings_measured": float(measured.sum()),
    }
    named = zip(network.findings, areas, strict=True)
    metrics |= {f"auroc/{finding}": float(area) for finding, area in named if not np.isnan(area)}
    return metrics, {"findings": list(network.findings), **chosen.describe()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
