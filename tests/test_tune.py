"""The parts of a search that need no cluster."""

from __future__ import annotations

import pytest

from cxr.tune import Mismatch, check_applied


def test_what_was_drawn_must_be_what_was_applied() -> None:
    check_applied({"lr": 0.1}, {"lr": 0.1, "epochs": 3})
    with pytest.raises(Mismatch, match=r"worker 1 .*lr: drawn 0.1, applied 0.2"):
        check_applied({"lr": 0.1, "trunk": "conv3"}, {"lr": 0.2, "trunk": "conv3"}, rank=1)
    with pytest.raises(Mismatch, match="applied None"):
        check_applied({"lr": 0.1}, {})
