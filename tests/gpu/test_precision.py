"""Scores in bfloat16 on a GPU equal those in float32, except for rounding."""

from __future__ import annotations

import pytest
import torch

from cxr.families import RECIPES
from tests.families.test_recipes import SMALL
from tests.precision_parity import check_boxes, check_trained, check_untrained

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_predictions_in_bfloat16_are_close(family: str, gpu: torch.device) -> None:
    check_untrained(family, gpu)


@pytest.mark.parametrize("family", ["aecnn", "attend", "classify", "localize"])
def test_decisions_in_bfloat16_are_those_in_float32(family: str, gpu: torch.device) -> None:
    check_trained(SMALL[family], gpu)


def test_boxes_in_bfloat16_are_those_in_float32(gpu: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    changed = check_boxes(gpu)
    with capsys.disabled():
        print(f"\n{changed}")
