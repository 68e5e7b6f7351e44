"""Found boxes judged by Ultralytics' code: who is right, once, and what that makes of the mean precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cxr.metrics.yolo import ROW, judged_rows, summary


def images(*rows: list[list[float]]) -> Tensor:
    most = max(map(len, rows))
    return torch.tensor([row + [[math.nan] * len(rows[0][0])] * (most - len(row)) for row in rows])


TRUE = images([[0, 0.1, 0.1, 0.5, 0.5], [1, 0.6, 0.6, 0.8, 0.8]], [[0, 0.2, 0.2, 0.4, 0.4]])


def test_a_box_is_right_at_the_overlaps_that_it_reaches() -> None:
    found = images([[0.1, 0.1, 0.5, 0.41, 0.9, 0]], [[0.2, 0.2, 0.4, 0.4, 0.8, 1]])  # IoU .775; another finding
    rows = judged_rows(found, TRUE)
    assert rows.shape == (2, ROW)
    assert rows[0].tolist() == pytest.approx([0.9, 0] + [1] * 6 + [0] * 4)
    assert rows[1, 2:].sum() == 0


def test_a_true_box_is_found_once() -> None:
    twice = [[0.1, 0.1, 0.5, 0.5, 0.9, 0], [0.1, 0.1, 0.5, 0.5, 0.8, 0]]
    rows = judged_rows(images(twice, [[math.nan] * 6]), TRUE)
    assert rows[:, 2].tolist() == [1, 0]


def test_perfect_boxes_have_a_precision_of_one() -> None:
    found = torch.cat([TRUE[..., 1:], torch.full((2, 2, 1), 0.9), TRUE[..., :1]], -1)
    found[TRUE[..., 0].isnan()] = math.nan
    told = summary(judged_rows(found, TRUE), torch.tensor([0.0, 1, 0]), 3)
    assert told["map50"] == pytest.approx(0.995, abs=1e-3)  # as Ultralytics sums up a curve
    assert told["map50_95"] == pytest.approx(told["map50"])
    missed = summary(judged_rows(found, TRUE)[:1], torch.tensor([0.0, 1, 0]), 3)
    assert missed["map50"] < 0.3


def test_nothing_found_and_nothing_to_find() -> None:
    none = torch.zeros(0, ROW)
    assert summary(none, torch.tensor([0.0]), 3)["map50_95"] == 0
    assert math.isnan(summary(none, torch.zeros(0), 3)["map50_95"])
