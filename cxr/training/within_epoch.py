"""Checkpoints within an epoch: when they are written, and what they hold in addition to those after an epoch.

Between two epochs, all workers hold the same state. Within one, each has its own random numbers, sums of losses and,
on CPUs, batch-norm statistics. Those of all workers are stored side by side, so that a run that resumes with as many
workers continues exactly; with another number, each worker gets their mean and new random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cxr.families.base import Communicator
from cxr.training.engine import Engine, EpochSoFar
from cxr.training.session import Session

RNG, CUDA_RNG = "rng", "cuda_rng"


@dataclass
class WithinEpoch:
    """Saves a checkpoint `every_s` seconds after the epoch began and after the last one (0: never), and when the loss
    of a machine is announced. One object per epoch."""

    session: Session
    every_s: float
    write: Callable[[EpochSoFar], None]
    _last: float = field(default_factory=time.monotonic)
    _known: frozenset[str] = frozenset()  # machines whose loss has been announced, and for which a checkpoint is due

    def due(self) -> bool:
        announced = self.session.machines_to_be_lost()
        if announced - self._known:
            self._known |= announced
            return True
        return 0 < self.every_s <= time.monotonic() - self._last

    def save(self, so_far: EpochSoFar) -> None:
        self.write(so_far)
        self._last = time.monotonic()


def state_within(engine: Engine, so_far: EpochSoFar, workers: Communicator) -> dict[str, Any]:
    """What resuming from here needs besides `Engine.state`: plain values, and tensors with a row per worker. All
    workers call this."""
    own = {
        RNG: torch.get_rng_state().to(engine.device),
        "sums": torch.stack([*so_far.sums.values()]),
        "counts": torch.tensor([so_far.images], device=engine.device, dtype=torch.float64),
        "statistics": _joined(engine.statistics(), engine.device),
        "epoch_sums": _joined(engine.task.epoch_sums(), engine.device),
    }
    if engine.device.type == "cuda":
        own[CUDA_RNG] = torch.cuda.get_rng_state(engine.device).to(engine.device)
    return {
        "steps": so_far.steps,
        "seconds": so_far.seconds,
        "waited": so_far.waited,
        "terms": list(so_far.sums),
        "workers": {name: workers.gather(row[None]).cpu() for name, row in own.items()},
    }


def continue_within(engine: Engine, state: dict[str, Any], workers: Communicator) -> EpochSoFar:
    """Restore what `state_within` returned; call it after the epoch's seed has been set."""
    stored: dict[str, Tensor] = state["workers"]
    before = len(stored[RNG])
    if before == workers.size:
        own = {name: rows[workers.rank].clone() for name, rows in stored.items()}
        torch.set_rng_state(own[RNG])  # which a view of another tensor would crash
        if CUDA_RNG in own and engine.device.type == "cuda":
            torch.cuda.set_rng_state(own[CUDA_RNG], engine.device)
    else:
        torch.manual_seed(torch.initial_seed() + 1_000_000_007 * state["steps"])
        own = {name: rows.double().mean(0) for name, rows in stored.items() if name not in (RNG, CUDA_RNG)}
        for name in ("counts", "epoch_sums"):
            own[name] *= before / workers.size
    engine.distributed()  # which makes all workers equal
    _copy(own["statistics"], engine.statistics())
    _copy(own["epoch_sums"], engine.task.epoch_sums())
    sums = own["sums"].to(engine.device, torch.float32)
    return EpochSoFar(
        state["steps"],
        round(own["counts"].item()),
        dict(zip(state["terms"], sums, strict=True)),
        state["seconds"],
        state["waited"],
    )


def _joined(tensors: list[Tensor], device: torch.device) -> Tensor:
    """All values, on `device` even if there are none, since GPUs exchange only what is on them."""
    none = torch.zeros(0, dtype=torch.float64, device=device)
    return torch.cat([none, *(t.detach().double().flatten() for t in tensors)])


def _copy(joined: Tensor, tensors: list[Tensor]) -> None:
    for values, own in zip(joined.split([t.numel() for t in tensors]), tensors, strict=True):
        own.copy_(values.reshape(own.shape))
