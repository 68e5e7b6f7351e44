"""The training step in plain torch: precision, gradients, schedule, moving average. No Ray, no files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cxr.data.batch import Batch, to_device
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Recipe, Stage, Task
from cxr.families.capabilities import BatchLookahead, optimization
from cxr.training import batch_norm


class UnrecoverableTrainingError(RuntimeError):
    """Training cannot continue, even after a restart; raised on every worker."""


class NonFiniteLossError(UnrecoverableTrainingError):
    """A loss term became NaN or infinite; the message names it."""


class Engine:
    """Trains one task on one device. With several workers, all of them call each method in the same order.

    Args:
        steps_per_epoch: used only for the schedule.
        stage: the stage to start with; by default the recipe's first.
        check_every: number of steps between checks of the running sums, the only time that the host waits for the
            device.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        workers: Communicator,
        *,
        steps_per_epoch: int,
        device: torch.device,
        stage: Stage | None = None,
        compiled: bool = False,
        check_every: int = 50,
    ) -> None:
        if steps_per_epoch < recipe.accumulate:
            raise UserError(
                f"accumulate={recipe.accumulate} with {steps_per_epoch} steps per epoch: the weights would never "
                f"be updated. Lower accumulate or batch_size"
            )
        self.recipe, self.workers, self.device, self.check_every = recipe, workers, device, check_every
        self.steps_per_epoch = steps_per_epoch
        self.optimization = optimization(recipe)
        self.task = task.to(device=device)
        self.task.workers = workers
        self.casts = casts(recipe.precision, device)
        if recipe.sync_batch_norm and workers.size > 1 and device.type == "cuda":
            task.network = batch_norm.synchronized(task.network)
        if self.casts:
            task.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        torch.backends.cudnn.benchmark = True  # all steps of a stage have the same shapes
        if compiled:
            for part in task.compiled_modules():
                part.compile()
        self.average: MovingAverage | None = None
        self.enter(stage or recipe.stages()[0])

    def enter(self, stage: Stage) -> None:
        """Start a stage, which may train another part of the task, with a new optimizer, schedule and moving
        average."""
        if self.average is not None:  # the result of a stage is the network that was validated
            self.task.network.load_state_dict(self.average.module.state_dict())
        self.stage = stage
        self.task.enter_stage(stage.name)
        ema = self.recipe.ema
        self.average = MovingAverage(self.task.network, ema, self.optimization.ema_ramp) if ema else None
        self.parameters = [p for p in self.task.parameters() if p.requires_grad]
        scaled = replace(stage, lr=stage.lr * self.recipe.lr_factor)
        self.optimizer = self.optimization.make_optimizer(self.task, scaled, fused=self.device.type == "cuda")
        moves = max(1, self.steps_per_epoch * stage.data_echo_factor // self.recipe.accumulate)
        self.schedule = self.optimization.make_schedule(self.optimizer, scaled, moves)
        self._forward: nn.Module | None = None

    def epoch(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Train on one epoch's batches. Returns the mean of each loss term over all workers' steps, and the mean of
        their sum.

        Raises:
            NonFiniteLossError: a term stopped being finite; raised on every worker, within `check_every` steps.
        """
        self.task.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        steps = images = 0
        for batch in self._echoed(batches):
            steps += 1
            images += len(next(iter(batch.values())))
            terms = self.step(batch, last=steps % self.recipe.accumulate == 0)
            for name, value in terms.items():
                sums[name] = sums[name] + value if name in sums else value
            if steps % self.check_every == 0:
                self._means(sums, steps)
        if not steps:
            raise UnrecoverableTrainingError(
                "an epoch produced no batches: lower batch_size, or give a larger archive"
            )
        means = self._means(sums, steps)
        means["loss"] = sum(value for name, value in means.items() if name != "grad_norm")
        return means | {"images": self.workers.sum(torch.tensor(float(images), device=self.device)).item()}

    def _echoed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches on this engine's device, each repeated as often as the stage requires; every step augments it
        anew."""
        moved = self.moved(batches)
        if isinstance(self.task, BatchLookahead):
            moved = self.task.look_ahead(moved)
        return (batch for batch_on_device in moved for batch in repeat(batch_on_device, self.stage.data_echo_factor))

    def step(self, batch: Batch, *, last: bool = True) -> dict[str, Tensor]:
        """Augment, forward and backward; with `last`, also update the weights. Returns detached terms, without a host
        sync.

        Augmentation runs outside autocast (`Task.augment`) and on the unwrapped task, since it has no gradients to
        average over workers.
        """
        module = self._distributed()
        augmented = self.task.augment(batch)
        with self._no_sync(module, last):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
                terms = module(augmented)
            total = torch.stack(list(terms.values())).sum()
            (total * (self.optimization.loss_scale / self.recipe.accumulate)).backward()
        detached = {name: value.detach().float() for name, value in terms.items()}
        return detached | ({"grad_norm": self._move() * self.recipe.accumulate} if last else {})

    def _move(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.task.network)
        return norm.detach().float()

    def _distributed(self) -> nn.Module:
        """The task, wrapped once for gradient averaging if several workers train."""
        if self._forward is None:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrap = self.workers.size > 1
            self._forward = (
                DistributedDataParallel(self.task, device_ids=ids, forward_sync_buffers=False) if wrap else self.task
            )
        return self._forward

    @staticmethod
    def _no_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        waits = isinstance(module, DistributedDataParallel) and not last
        return module.no_sync() if waits else nullcontext()  # pyright: ignore[reportCallIssue, reportReturnType]

    def _means(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over all workers; raises if one is not finite, so that all workers stop together."""
        totals = self.workers.sum(torch.stack([*sums.values()]))
        means = dict(zip(sums, (totals / (steps * self.workers.size)).tolist(), strict=True))
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"{', '.join(bad)} became NaN or infinite within {steps} steps of an epoch: lower lr, or the "
                f"weight of that term; the last good checkpoint is kept"
            )
        return means

    def finish_epoch(self, batches: Batches) -> dict[str, float]:
        """Close the epoch: task statistics, equal batch-norm statistics on all workers, then validation."""
        self.task.end_epoch(self.workers)
        self._share_statistics()
        return self.validated(self.shipped(), batches)

    def validated(self, shown: nn.Module, batches: Batches) -> dict[str, float]:
        """The metrics of a network from the task's validation, the same on all workers."""
        trained = self.task.network
        self.task.eval()
        self.task.network = shown.eval()
        try:
            with torch.inference_mode():
                return self.task.evaluate(lambda: self.moved(batches()), self.workers)
        finally:
            self.task.network = trained

    def moved(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches on this engine's device."""
        return (to_device(batch, self.device) for batch in batches)

    def _share_statistics(self) -> None:
        """Average running statistics over workers, each of which saw only its own images."""
        if self.workers.size == 1:
            return
        averaged = [] if self.average is None else [self.average.module]
        for network in (self.task.network, *averaged):
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.workers.sum(buffer) / self.workers.size)

    def shipped(self) -> nn.Module:
        """The network that is validated and saved: the moving average if there is one."""
        return self.average.module if self.average is not None else self.task.network

    def state(self) -> dict[str, Any]:
        """The state that exact resuming needs in addition to the task's own state."""
        state = {
            "network": self.task.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        return state | ({"average": self.average.state_dict()} if self.average is not None else {})

    def restore(self, state: dict[str, Any]) -> None:
        self.task.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def casts(precision: str, device: torch.device) -> bool:
    """Whether training computes in bfloat16; see `Recipe.precision`."""
    if device.type == "cuda":
        return precision != "float32"
    able = torch.cpu.get_capabilities()
    return precision == "bfloat16" and (able.get("avx512_bf16", False) or able.get("amx_bf16", False))


class MovingAverage(AveragedModel):
    """An exponential moving average of a network's parameters and buffers; integers are copied.

    The update of AveragedModel itself copies its counter to the device in every step, for which the host waits.

    Args:
        decay, ramp: see `Recipe.ema` and `CustomOptimizer.ema_ramp`.
    """

    def __init__(self, network: nn.Module, decay: float, ramp: float) -> None:
        super().__init__(network, use_buffers=True)
        self.decay, self.ramp = decay, ramp

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move toward `model`; the first update copies it."""
        done = int(self.n_averaged)  # on the CPU
        grown = 1 - math.exp(-(done + 1) / self.ramp) if self.ramp else 1.0
        decay = self.decay * grown if done else 0.0
        pairs = list(zip(_values(self.module), _values(model), strict=True))
        for dtype in {own.dtype for own, _ in pairs}:
            averages, values = zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True)
            if dtype.is_floating_point:
                torch._foreach_lerp_(averages, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
            else:
                torch._foreach_copy_(averages, values)  # pyright: ignore[reportPrivateImportUsage]
        self.n_averaged += 1


def _values(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
