"""Scores in bfloat16 equal those in float32, except for rounding: every family on the CPU."""

from __future__ import annotations

import pytest
import torch

from cxr.families import RECIPES
from tests.by_family import by_family
from tests.families.test_recipes import SMALL
from tests.precision_parity import check_boxes, check_trained, check_untrained

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", by_family(RECIPES))
def test_predictions_in_bfloat16_are_close(family: str) -> None:
    check_untrained(family, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["aecnn", "attend", "classify", "localize"])
def test_decisions_in_bfloat16_are_those_in_float32(family: str) -> None:
    check_trained(SMALL[family], CPU)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_boxes_in_bfloat16_are_those_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    changed = check_boxes(CPU)
    with capsys.disabled():
        print(f"\n{changed}")
