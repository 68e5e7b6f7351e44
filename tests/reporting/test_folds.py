"""What folds say together."""

from __future__ import annotations

import math

import pytest

from cxr.reporting import folds

METRICS = [{"dice": 0.8, "hd95_px": 5.0}, {"dice": 0.7, "hd95_px": math.nan}, {"dice": 0.9}]


def test_mean_and_standard_deviation_are_over_all_folds_or_unknown() -> None:
    found = folds.together(METRICS)
    assert found["dice"] == pytest.approx(0.8)
    assert found["dice_sd"] == pytest.approx(0.1)
    assert math.isnan(found["hd95_px"])
    assert math.isnan(found["hd95_px_sd"])


def test_the_table_has_each_fold() -> None:
    head, _, dice, distance = folds.table(METRICS).splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["metric", "mean ± SD", "fold 0", "fold 1", "fold 2"]
    assert [cell.strip() for cell in dice.split("|")[1:-1]] == ["dice", "0.8 ± 0.1", "0.8", "0.7", "0.9"]
    assert [cell.strip() for cell in distance.split("|")[1:-1]] == ["hd95_px", "– ± –", "5", "–", "–"]
