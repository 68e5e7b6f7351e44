"""The three thresholds: their effect on probabilities, and their selection from counts."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import Tensor

from cxr.metrics.segmentation import dice, overlap_rows
from cxr.metrics.segmentation.mask_thresholds import BOTTOMS, MIN_AREAS, TOPS, MaskRule, choose_rule, rule_rows


def test_too_few_certain_pixels_make_an_empty_mask() -> None:
    p = torch.full((3, 10, 10), 0.1)
    p[:, :4, :5] = 0.4
    p[0, 0, :4] = 0.8
    p[1, 0, :5] = 0.8
    p[2, 0, :5] = 0.75
    masks = MaskRule(top=0.75, min_area=0.05, bottom=0.3).apply(p)
    assert masks.dtype == torch.bool
    assert masks.flatten(1).sum(1).tolist() == [0, 20, 0]
    assert MaskRule(0.75, 0, 0.3).apply(p).flatten(1).sum(1).tolist() == [20] * 3


def test_a_rule_applies_at_every_size() -> None:
    p = torch.full((2, 32, 32), 0.5)
    p[0, :2, :1], p[1, :1, :1] = 0.9, 0.9
    larger = p.repeat_interleave(32, 1).repeat_interleave(32, 2)
    rule = MaskRule()
    assert [bool(mask.any()) for mask in rule.apply(p)] == [
        True,
        False,
    ]  # 2 pixels of 32 x 32 are 2048 of 1024 x 1024
    assert [bool(mask.any()) for mask in rule.apply(larger)] == [True, False]


def test_a_rule_survives_json() -> None:
    rule = MaskRule(0.6, 0.01, 0.4)
    assert MaskRule(**json.loads(json.dumps(rule.describe()))) == rule
    with pytest.raises(ValueError, match="shares in"):
        MaskRule(min_area=2000)


def validation(images: int = 24, size: int = 16) -> tuple[Tensor, Tensor]:
    """Unsure probabilities of blocks; half of the images have nothing to find, and some of them a likely speck."""
    rng = torch.Generator().manual_seed(0)
    true = torch.zeros(images, size, size, dtype=torch.bool)
    true[::2, 4:10, 5:12] = True
    p = 0.5 * torch.rand(true.shape, generator=rng) + 0.35 * true
    p[1::4, 0, :2] = 0.86
    return p, true


def test_the_best_rule_of_all_is_chosen() -> None:
    p, true = validation()
    tops, bottoms, areas = (0.5, 0.7, 0.8), (0.3, 0.45, 0.6), (0.0, 0.005, 0.02, 0.2)
    chosen = choose_rule(rule_rows(p, true, tops, bottoms), tops, bottoms, areas)
    by_hand = {
        rule: dice(overlap_rows(rule.apply(p), true)).mean().item()
        for rule in (MaskRule(top, area, bottom) for top, area, bottom in product(tops, areas, bottoms))
    }
    assert by_hand[chosen] == pytest.approx(max(by_hand.values()))
    assert by_hand[chosen] > max(value for rule, value in by_hand.items() if not rule.min_area)
    assert by_hand[chosen] > by_hand[MaskRule(0.5, 0, 0.3)]


def test_the_minimum_of_certain_pixels_is_inclusive() -> None:
    p = torch.zeros(2, 8, 8)
    p[0, 0, :4], p[1, 0, :3] = 0.9, 0.9
    true = torch.zeros(2, 8, 8, dtype=torch.bool)
    true[0, 0, :4] = True
    rows = rule_rows(p, true, (0.5,), (0.5,))
    assert choose_rule(rows, (0.5,), (0.5,), (0, 4 / 64, 5 / 64)) == MaskRule(0.5, 4 / 64, 0.5)


def test_several_workers_choose_the_same_rule_as_one_at_any_size() -> None:
    p, true = validation()
    larger_p, larger_true = (x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in (p[12:], true[12:]))
    together = torch.cat([rule_rows(p[:12], true[:12]), rule_rows(larger_p, larger_true)])
    assert choose_rule(together) == choose_rule(rule_rows(p, true))


def test_of_equals_the_plainest_rule_is_chosen() -> None:
    true = torch.zeros(2, 8, 8, dtype=torch.bool)
    true[:, 2:5, 2:5] = True
    rows = rule_rows(true.float(), true)
    assert choose_rule(rows) == MaskRule(TOPS[0], MIN_AREAS[0], BOTTOMS[0]) == MaskRule(0.5, 0, 0.5)


def test_rows_of_another_grid_are_rejected() -> None:
    rows = rule_rows(*validation())
    with pytest.raises(ValueError, match="expected rows of this grid"):
        choose_rule(rows, tops=(0.5,))
    with pytest.raises(ValueError, match="expected rows of this grid"):
        choose_rule(rows[:0])
