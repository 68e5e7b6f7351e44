"""Jobs of studies without a cluster and without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cxr.cli import study_networks
from cxr.cli.inputs import Inputs
from cxr.cli.plans import Capacity
from cxr.families.base import Recipe
from cxr.training.sweep import Trained
from tests.saved_checkpoint import save_untrained


def without_cluster(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cxr.cli.plans.Capacity.of", lambda options: Capacity(2, 0, "of a test"))
    patch.setattr(study_networks, "connect", lambda *_: None)


def without_checks(patch: pytest.MonkeyPatch) -> None:
    """No cluster, and no check of the input."""
    without_cluster(patch)
    patch.setattr(study_networks, "check_inputs", lambda recipe, data, out: Inputs(out, 8))


def untrained(findings: tuple[str, ...]) -> Callable[..., list[Trained]]:
    """In place of `train_all`: checkpoints of networks with random weights, which depend on the seed."""
    return partial(_untrained, findings)


def _untrained(
    findings: tuple[str, ...],
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int],
    data: Any,
    out: str,
    *_: Any,
    **options: Any,
) -> list[Trained]:
    made = [(name, seed, f"{out}/{name}/seed-{seed}/checkpoint") for name in recipes for seed in seeds]
    return [Trained(name, seed, save_untrained(Path(uri), recipes[name], findings, seed)) for name, seed, uri in made]


def only_named(recipes: Mapping[str, Recipe], seeds: Sequence[int], *_: Any, **options: Any) -> list[Trained]:
    """In place of `train_all`: checkpoints that do not exist."""
    return [Trained(name, seed, f"{name}/{seed}") for name in recipes for seed in seeds]
