"""Tensors are found under any prefix, and what differs is said in one line."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from cxr.models.state_dicts import matching

OWN = {
    "conv.weight": torch.zeros(4, 3, 2, 2),
    "norm.num_batches_tracked": torch.tensor(0),
    "norm.bias": torch.ones(4),
}


def renamed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: values + 1 for name, values in OWN.items()}


def test_the_prefix_is_that_under_which_most_fits() -> None:
    decoy = {"other.norm.bias": torch.ones(4), "conv.weight": torch.zeros(9)}
    found = matching(OWN, decoy | renamed("deep.body."), "it")
    assert found.keys() == OWN.keys()
    assert all(torch.equal(found[name], values + 1) for name, values in OWN.items())


def test_counters_may_be_missing_and_linear_layers_may_be_unrolled() -> None:
    given = {"conv.weight": torch.ones(4, 12), "norm.bias": torch.ones(4)}
    found = matching(OWN, given, "it")
    assert found["conv.weight"].shape == (4, 3, 2, 2)
    assert "norm.num_batches_tracked" not in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.ones(1)}, "they have none of the 2 tensors of it, such as conv.weight"),
        ({"a.conv.weight": OWN["conv.weight"]}, "they lack 1 of the 2 tensors of it, such as a.norm.bias"),
        (
            renamed("") | {"conv.weight": torch.ones(4, 1, 2, 2)},
            "conv.weight of it: expected shape 4 x 3 x 2 x 2, got 4 x 1 x 2 x 2 (input channels: expected 3, got 1)",
        ),
        (
            {name: torch.ones(7) for name in OWN},
            "conv.weight of it: expected shape 4 x 3 x 2 x 2, got 7; 1 more tensors differ in shape",
        ),
    ],
)
def test_the_message_names_what_differs(given: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        matching(OWN, given, "it")


def test_a_whole_network_has_no_prefix_and_nothing_more() -> None:
    assert matching(OWN, renamed(""), "it", whole=True).keys() == OWN.keys()
    with pytest.raises(ValueError, match="none of the 2"):
        matching(OWN, renamed("body."), "it", whole=True)
    with pytest.raises(ValueError, match="they have 1 tensor that it does not have, such as more"):
        matching(OWN, renamed("") | {"more": torch.ones(1)}, "it", whole=True)
