"""Training's validation and the report give the same number for the same boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cxr.families.base import SingleProcess
from cxr.metrics import detection
from cxr.metrics.detection import BoxMeter
from cxr.metrics.localization import Boxes

IMAGES, FINDINGS, CPU = 12, 3, torch.device("cpu")


class Recording(SingleProcess):
    """One of two workers; records what it sends, and receives what the other worker has sent."""

    size = 2

    def __init__(self, rank: int, received: list[Tensor] | None = None) -> None:
        self.rank = rank
        self.sent: list[Tensor] = []
        self.received = received or []

    def gather(self, rows: Tensor) -> Tensor:
        self.sent.append(rows)
        return torch.cat([self.received[len(self.sent) - 1], rows]) if self.received else rows


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """(N, 20, 6) predictions, half of them near ground-truth boxes, and (N, 4, 5) ground-truth boxes; some of both
    are missing."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.6, (IMAGES, 4, 2))
    there = np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], -1)
    true = np.concatenate([rng.integers(2, size=(IMAGES, 4, 1)), there], -1)
    near = np.repeat(there, 5, 1) + rng.normal(0, 0.05, (IMAGES, 20, 4))
    finding = np.where(rng.random((IMAGES, 20, 1)) < 0.8, np.repeat(true[..., :1], 5, 1), 2)
    predicted = np.concatenate([near, rng.random((IMAGES, 20, 1)).round(1), finding], -1)
    predicted[rng.random((IMAGES, 20)) < 0.3] = math.nan
    true[rng.random((IMAGES, 4)) < 0.3] = math.nan
    return torch.tensor(predicted, dtype=torch.float32), torch.tensor(true, dtype=torch.float32)


def flat(boxes_BN6: np.ndarray) -> Boxes:
    """From finding, score, corners."""
    image, place = np.nonzero(~np.isnan(boxes_BN6[..., 0]))
    some = boxes_BN6[image, place]
    return Boxes(image, some[:, 0].astype(int), some[:, 2:], some[:, 1])


def test_validation_gives_the_numbers_of_the_report(batch: tuple[Tensor, Tensor]) -> None:
    predicted, true = batch
    meter = BoxMeter(CPU)
    for start in (0, 5, 10):
        meter.add(predicted[start : start + 5], true[start : start + 5])
    results = meter.results(SingleProcess(), FINDINGS)
    p, t = predicted.double().numpy(), true.double().numpy()
    summary = detection.summarize(
        flat(np.concatenate([p[..., 5:], p[..., 4:5], p[..., :4]], -1)),
        flat(np.concatenate([t[..., :1], np.zeros_like(t[..., :1]), t[..., 1:]], -1)),
        np.arange(IMAGES),
        ["a", "b", "c"],
        resamples=2,
    )
    assert results["map_50_95"] == pytest.approx(summary.map_50_95)
    assert (results["map_40"], results["map_50"]) == (summary.voc[0.4].mean, summary.voc[0.5].mean)
    assert 0.05 < results["map_50_95"] < results["map_50"] < results["map_40"] < 1
    assert 0.2 < results["precision"] < 1
    assert 0.2 < results["recall"] < 1


def test_two_workers_have_the_metrics_of_one(batch: tuple[Tensor, Tensor]) -> None:
    predicted, true = batch
    alone, meters = BoxMeter(CPU), [BoxMeter(CPU) for _ in range(2)]
    alone.add(predicted, true)
    for rank, meter in enumerate(meters):
        meter.add(predicted[rank::2], true[rank::2])
    first = Recording(0)
    meters[0].results(first, FINDINGS)
    assert meters[1].results(Recording(1, first.sent), FINDINGS) == alone.results(SingleProcess(), FINDINGS)


def test_precision_and_recall_are_those_of_the_best_score() -> None:
    """At .8 one of two is right and nothing else is predicted; at .7 the second comes with two mistakes."""
    here, there, elsewhere = [0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7], [0.8, 0, 1, 0.2]
    predicted = [[*here, 0.8, 0], [*there, 0.7, 0], [*elsewhere, 0.7, 0], [*elsewhere, 0.7, 0], [*elsewhere, 0.7, 0]]
    meter = BoxMeter(CPU)
    meter.add(torch.tensor([predicted]), torch.tensor([[[0, *here], [0, *there]]]))
    results = meter.results(SingleProcess(), FINDINGS)
    assert (results["precision"], results["recall"]) == (1, 0.5)


def test_no_predictions_score_zero_and_no_true_boxes_nan() -> None:
    none, box = torch.full((1, 1, 6), math.nan), torch.tensor([[[0, 0.1, 0.1, 0.5, 0.5]]])
    meter = BoxMeter(CPU)
    meter.add(none, box)
    assert set(meter.results(SingleProcess(), FINDINGS).values()) == {0}
    empty = BoxMeter(CPU).results(SingleProcess(), FINDINGS)
    assert all(math.isnan(value) for value in empty.values())
