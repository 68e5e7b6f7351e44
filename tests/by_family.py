"""Cases of a test that runs for every family: `make test` runs some of them, `make test-all` all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

QUICK = frozenset({"align", "classify", "localize", "lungs"})  # those with small networks in tests


def by_family(names: Iterable[str], quick: Collection[str] = QUICK) -> list[Any]:
    """The names in order, for `pytest.mark.parametrize`; those not in `quick` are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]
