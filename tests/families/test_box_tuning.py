"""Thresholds and offsets of boxes from a few ground-truth boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cxr.boxes.from_heatmaps import BoxRule
from cxr.families.base import SingleProcess
from cxr.families.box_tuning import (
    MIN_FOR_OFFSET,
    MIN_IMAGES,
    THRESHOLDS,
    TunedBoxes,
    TuningExample,
    adjusted,
    tune,
)

CPU = torch.device("cpu")
CELLS = 64


def examples(count: int, finding: int = 0, thresholds: Sequence[float] = (0.5, *THRESHOLDS)) -> list[TuningExample]:
    """A spot with a dim rim at the left end of a box that is 4 times as wide and twice as high as the spot."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        left, top = rng.integers(6, 24, 2)
        heat = np.zeros((CELLS, CELLS), np.uint8)
        rim = rng.integers(1, 6)  # differs, so that a threshold below it gives no constant offset
        heat[top - rim : top + 8, left - rim : left + 8] = 60
        heat[top : top + 8, left : left + 8] = 255
        box = np.array([[left, top - 4, left + 32, top + 12]]) / CELLS
        found.append(TuningExample.of(finding, heat, box, BoxRule(), thresholds))
    return found


def tuned(given: Sequence[TuningExample], thresholds: Sequence[float] = (0.5, *THRESHOLDS)) -> TunedBoxes:
    return tune(given, 2, thresholds, SingleProcess(), CPU)


def test_a_constant_offset_is_found() -> None:
    result = tuned(examples(12))
    assert result.overlaps == pytest.approx(np.ones(12), abs=0.02)
    assert result.thresholds[0] > 60 / 255
    spot = np.array([[10, 20, 18, 28]]) / CELLS
    assert adjusted(spot, result.offsets[0]) == pytest.approx(np.array([[10, 16, 42, 32]]) / CELLS, abs=0.01)
    assert result.thresholds[1] == 0.5
    assert not result.offsets[1].any()


def test_few_examples_or_a_single_threshold_change_nothing() -> None:
    for result in (tuned(examples(MIN_IMAGES - 1)), tuned(examples(12, thresholds=[0.5]), [0.5])):
        assert result.thresholds.tolist() == [0.5, 0.5]
        assert not result.offsets.any()
        assert result.overlaps == pytest.approx(np.full(len(result.overlaps), 0.125), abs=0.01)
    assert tuned([]).overlaps.shape == (0,)


def test_an_offset_needs_more_examples_than_a_threshold() -> None:
    result = tuned(examples(MIN_FOR_OFFSET - 1))
    assert not result.offsets.any()
    assert result.thresholds[0] < 0.25  # the box with the rim is larger


def test_a_threshold_stays_if_no_other_is_better() -> None:
    nothing = tuple(np.zeros((0, 4)) for _ in (0.5, *THRESHOLDS))
    result = tuned([TuningExample(0, example.true, nothing) for example in examples(12)])
    assert result.thresholds.tolist() == [0.5, 0.5]
    assert not result.offsets.any()


def test_an_offset_that_makes_boxes_worse_is_not_used() -> None:
    """The box is the spot itself in most images, but far away and larger in the others."""
    given = examples(13)
    spots = [replace(e, true=e.predicted[0]) if i % 3 else e for i, e in enumerate(given)]
    result = tuned(spots)
    assert (result.overlaps[[i for i in range(13) if i % 3]] > 0.9).all()


def test_maps_without_boxes_count_as_missed() -> None:
    given = examples(12)
    nothing = tuple(np.zeros((0, 4)) for _ in (0.5, *THRESHOLDS))
    dark = [TuningExample(0, example.true, nothing) for example in given[:4]]
    result = tuned([*given, *dark])
    assert result.overlaps[:12] == pytest.approx(np.ones(12), abs=0.02)
    assert not result.overlaps[12:].any()


@dataclass
class OneOfTwo:
    """A worker, and the rows that the other one contributes to each exchange."""

    others: list[Tensor]

    rank = 0
    size = 2

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, self.others.pop(0)])


class Recorded(SingleProcess):
    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def gather(self, rows: Tensor) -> Tensor:
        self.sent.append(rows)
        return rows


def test_the_examples_of_all_workers_count() -> None:
    whole, thresholds = examples(12), (0.5, *THRESHOLDS)
    together = Recorded()
    expected = tune(whole, 2, thresholds, together, CPU)
    others = [rows[5:] for rows in together.sent]
    result = tune(whole[:5], 2, thresholds, OneOfTwo(others), CPU)  # pyright: ignore[reportArgumentType]
    assert result.thresholds.tolist() == expected.thresholds.tolist()
    assert np.array_equal(result.offsets, expected.offsets)
    assert np.array_equal(result.overlaps, expected.overlaps)
