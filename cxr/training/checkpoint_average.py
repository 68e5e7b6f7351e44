"""The mean of a run's best networks, made once, at its end (as in Izmailov et al. 2018, arXiv 1803.05407)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import ray.train
import safetensors.torch
from torch import Tensor, nn

from cxr.families import checkpoint, checkpoint_files
from cxr.families.base import Recipe
from cxr.training.engine import Engine
from cxr.training.run_log import AVERAGE
from cxr.training.session import Reported


def best_kept(recipe: Recipe, count: int, reported: Sequence[Reported]) -> list[Reported]:
    """At most `count` rankable epochs whose checkpoints still exist, the best first."""
    sign = 1 if recipe.mode == "max" else -1
    rankable = [epoch for epoch in reported if epoch.metrics["stage"] != AVERAGE and epoch.metrics["rankable"]]
    best_first = sorted(
        rankable, key=lambda epoch: (sign * epoch.metrics[recipe.monitor], epoch.metrics["epoch"]), reverse=True
    )
    return best_first[:count]


def averaged_network(checkpoints: Sequence[ray.train.Checkpoint], engine: Engine) -> nn.Module:
    """A new network with the mean of the checkpoints' weights; the engine's task gets the state of the first one."""
    states: list[dict[str, Tensor]] = []
    for saved in checkpoints:
        states.append(_loaded(saved, checkpoint_files.WEIGHTS))
        if len(states) == 1:
            checkpoint.restore_task_state(engine.task, _loaded(saved, checkpoint_files.TASK))
    network = copy.deepcopy(engine.shipped())
    network.load_state_dict(checkpoint.averaged(states))
    return network


def _loaded(saved: ray.train.Checkpoint, name: str) -> dict[str, Tensor]:
    """One file of a checkpoint: what resuming needs is larger, and stays where it is."""
    assert saved.filesystem is not None
    with saved.filesystem.open_input_stream(f"{saved.path}/{name}") as file:
        return safetensors.torch.load(file.read())
