"""Means are exact for any shares of the workers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cxr.families.base import SingleProcess
from cxr.metrics.meters import Mean


class Two(SingleProcess):
    """The first of two workers; `other` is what the second one sends."""

    size = 2

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def sum(self, values: Tensor) -> Tensor:
        assert values.shape == self.other.shape
        return values + self.other


def test_batches_are_weighted_by_their_rows() -> None:
    mean = Mean()
    mean.add(torch.tensor([[1.0, 10], [2, 20]]))
    mean.add(torch.tensor([[6.0, 60]]))
    torch.testing.assert_close(
        mean.over(SingleProcess(), torch.zeros(2)), torch.tensor([3.0, 30], dtype=torch.float64)
    )


def test_workers_are_weighted_by_their_rows() -> None:
    mean = Mean()
    mean.add(torch.tensor([1.0, 2, 3]))
    other = torch.tensor([10.0, 1], dtype=torch.float64)  # the sum and the count of one row
    assert mean.over(Two(other), torch.zeros(())).item() == pytest.approx(16 / 4)


def test_a_worker_without_rows_still_sends_the_right_shape() -> None:
    other = torch.tensor([4.0, 8, 2], dtype=torch.float64)
    assert Mean().over(Two(other), torch.zeros(2)).tolist() == [2, 4]


def test_without_images_metrics_are_nan() -> None:
    assert Mean().over(SingleProcess(), torch.zeros(())).isnan()
