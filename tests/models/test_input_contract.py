"""The input contract: pixels to a network's input, its description in JSON, and mistakes in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cxr.errors import UserError
from cxr.models.input_contract import CONTRACTS, IMAGENET, InputContract, named


def test_black_and_white_become_the_ends_of_the_range() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)
    assert named("torchxrayvision").apply(x).flatten().tolist() == [-1024, -512, 1024]
    assert InputContract(range=(0, 255)).apply(x).flatten().tolist() == [0, 63.75, 255]
    assert torch.equal(named("unit").apply(x), x)


def test_each_channel_is_normalized() -> None:
    x = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (x.expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(IMAGENET.apply(x), expected)


def test_input_is_float32_outside_and_inside_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert named("clip").apply(torch.rand(1, 1, 4, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_survives_json(name: str) -> None:
    contract = named(name, 96)
    assert contract.size == 96
    assert InputContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_differences_name_the_values() -> None:
    assert named("unit", 224).differences(named("unit", 224)) == []
    assert named("unit", 224).differences(named("torchxrayvision")) == [
        "range: [0.0, 1.0] and [-1024.0, 1024.0]",
        "crop: letterbox and center",
        "resampling: area and gaussian",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "input size: expected 1 or more pixels, got 0"),
        ({"channels": 2}, "input channels: expected 1 or 3, got 2"),
        ({"range": (1.0, 0.0)}, "input range: expected two numbers, the smaller one first"),
        ({"range": (0.0, float("nan"))}, "input range"),
        ({"mean": (0.0, 0.0)}, "input mean: expected one number for each of 1 channels"),
        ({"channels": 3}, "input mean: expected one number for each of 3 channels"),
        ({"std": (0.0,)}, "input std: expected positive numbers"),
        ({"crop": "random"}, "input crop: expected one of letterbox, center, got random"),
        ({"resampling": "cubic"}, "input resampling: expected one of area, gaussian, got cubic"),
        ({"resampling": "gaussian"}, "gaussian needs crop=center"),
    ],
)
def test_invalid_values_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputContract(**values)


def test_unknown_contracts_and_descriptions_are_rejected() -> None:
    with pytest.raises(UserError, match=r"input: expected one of unit, imagenet, .*, torchxrayvision, got 'x'"):
        named("x")
    with pytest.raises(UserError, match=r"input contract: expected channels, crop, .*, got size"):
        InputContract.from_dict({"size": 3})
