"""The training step in plain torch: precision, gradients, schedule, moving average. No Ray, no files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cxr.data.batch import Batch, to_device
from cxr.data.device_time import DeviceTime
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Recipe, Stage, Task
from cxr.families.capabilities import BatchLookahead, optimization
from cxr.training import batch_norm


class UnrecoverableTrainingError(RuntimeError):
    """Training cannot continue, even after a restart; raised on every worker."""


class NonFiniteLossError(UnrecoverableTrainingError):
    """A loss term became NaN or infinite; the message names it."""


CHECK_SECONDS = 10.0  # longest time between two checks of an epoch, unless a single step takes longer


@dataclass
class EpochSoFar:
    """What one worker has done of an epoch, and the sums from which the epoch's means are made."""

    steps: int = 0
    images: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sum of each loss term over the steps, on the device."""
    seconds: float = 0.0
    """Duration of the steps, without writing checkpoints."""
    waited: float = 0.0
    """Seconds of it in which this process waited for batches."""

    def next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, or None at the end; counts the time until it is there."""
        start = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - start
        return batch


class CheckpointsWithinEpoch(Protocol):
    """Decides when to save the state within an epoch, and saves it. Called on all workers after the same steps."""

    def due(self) -> bool:
        """Whether to save soon; one worker that says so is enough."""
        ...

    def save(self, so_far: EpochSoFar) -> None: ...


class Engine:
    """Trains one task on one device. With several workers, all of them call each method in the same order.

    Args:
        steps_per_epoch: used only for the schedule.
        stage: the stage to start with; by default the recipe's first.
        check_every: largest number of steps between checks of the running sums, the only time that the host waits for
            the device. Steps that take long are checked more often (CHECK_SECONDS).
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
        self.device_time = DeviceTime(device)
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

    def epoch(
        self,
        batches: Iterator[Batch],
        so_far: EpochSoFar | None = None,
        checkpoints: CheckpointsWithinEpoch | None = None,
    ) -> dict[str, float]:
        """Train on one epoch's batches. Returns the mean of each loss term over all workers' steps, and the mean of
        their sum.

        Args:
            batches: those of the epoch; when it is continued, without the first `unneeded_batches`.
            so_far: what an interrupted run has done of this epoch; updated here.

        Raises:
            NonFiniteLossError: a term stopped being finite; raised on every worker, within `check_every` steps.
        """
        self.task.train()
        self.optimizer.zero_grad(set_to_none=True)
        so_far = so_far or EpochSoFar()
        start, next_check, due = time.monotonic() - so_far.seconds, so_far.steps + 1, False
        batches = self._echoed(batches, so_far)
        while (batch := so_far.next(batches)) is not None:
            so_far.steps += 1
            so_far.images += len(next(iter(batch.values())))
            with self.device_time.measured():
                terms = self.step(batch, last=so_far.steps % self.recipe.accumulate == 0)
            for name, value in terms.items():
                so_far.sums[name] = so_far.sums[name] + value if name in so_far.sums else value
            if so_far.steps == next_check:
                pace = (time.monotonic() - start) / so_far.steps
                _, (wishes, pace) = self._means(so_far, float(checkpoints is not None and checkpoints.due()), pace)
                due = due or wishes > 0
                next_check += max(1, min(self.check_every, int(CHECK_SECONDS / max(pace, 1e-9))))
            ends = so_far.steps >= self.steps_per_epoch * self.stage.data_echo_factor  # with a checkpoint anyway
            if due and checkpoints and not ends and so_far.steps % self._steps_between_states == 0:
                so_far.seconds = time.monotonic() - start
                checkpoints.save(so_far)
                start, due = time.monotonic() - so_far.seconds, False
        so_far.seconds = time.monotonic() - start
        if not so_far.steps:
            raise UnrecoverableTrainingError(
                "an epoch produced no batches: lower batch_size, or use a larger archive"
            )
        means, _ = self._means(so_far)
        means["loss"] = sum(value for name, value in means.items() if name != "grad_norm")
        return means | {"images": self.workers.sum(torch.tensor(float(so_far.images), device=self.device)).item()}

    @property
    def _steps_between_states(self) -> int:
        """Training can be continued after multiples of so many steps, when no batch or gradient is in use."""
        return math.lcm(self.stage.data_echo_factor, self.recipe.accumulate)

    def unneeded_batches(self, so_far: EpochSoFar) -> int:
        """How many batches at the beginning of an epoch the rest of it does not depend on."""
        done = so_far.steps // self.stage.data_echo_factor
        if isinstance(self.task, BatchLookahead):
            rows = max(1, so_far.images // max(1, so_far.steps))
            return max(0, done - self.task.batches_before(rows))
        return done

    def _echoed(self, batches: Iterator[Batch], so_far: EpochSoFar) -> Iterator[Batch]:
        """The batches of the steps that are left, on this engine's device, each repeated as often as the stage
        requires; every step augments it anew.

        Args:
            batches: without the first `unneeded_batches`.
        """
        moved, skipped = self.moved(batches), self.unneeded_batches(so_far)
        if isinstance(self.task, BatchLookahead):  # it must have seen some of the batches before
            seen = so_far.steps // self.stage.data_echo_factor - skipped
            moved = islice(self.task.look_ahead(moved, skipped), seen, None)
        return (batch for batch_on_device in moved for batch in repeat(batch_on_device, self.stage.data_echo_factor))

    def step(self, batch: Batch, *, last: bool = True) -> dict[str, Tensor]:
        """Augment, forward and backward; with `last`, also update the weights. Returns detached terms, without a host
        sync.

        Augmentation runs outside autocast (`Task.augment`) and on the unwrapped task, since it has no gradients to
        average over workers.
        """
        module = self.distributed()
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

    def distributed(self) -> nn.Module:
        """The task, wrapped once for gradient averaging if several workers train; this makes their states equal."""
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

    def _means(self, so_far: EpochSoFar, *values: float) -> tuple[dict[str, float], list[float]]:
        """Means of the loss terms and of other `values` over all workers; raises if a term's is not finite, so that
        all workers stop together."""
        terms, steps = so_far.sums, so_far.steps
        totals = self.workers.sum(torch.stack([*terms.values(), *torch.tensor(values, device=self.device)]))
        averages = (totals / self.workers.size).tolist()
        means = {name: total / steps for name, total in zip(terms, averages, strict=False)}
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"{', '.join(bad)} became NaN or infinite within {steps} steps of an epoch: lower lr, or the "
                f"weight of that term; the last good checkpoint is kept"
            )
        return means, averages[len(terms) :]

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
        for statistics in self.statistics():
            statistics.copy_(self.workers.sum(statistics) / self.workers.size)

    def statistics(self) -> list[Tensor]:
        """Buffers that differ by worker during an epoch: running statistics of the network and of its average."""
        averaged = [] if self.average is None else [self.average.module]
        networks = (self.task.network, *averaged)
        return [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]

    def exchange_seconds(self) -> float:
        """Mean time for which an update waited for other workers' gradients after its own backward pass.

        DDP measures it in the first ten steps of a stage and in every hundredth. What overlaps with the backward pass
        is not included; waiting for slower workers is.
        """
        if not isinstance(self._forward, DistributedDataParallel):
            return 0.0
        measured = self._forward._get_ddp_logging_data()
        exchange, hidden = (
            float(measured.get(name, 0))
            for name in ("avg_backward_comm_time", "avg_backward_compute_comm_overlap_time")
        )
        return max(0.0, exchange - hidden) / 1e9

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

    The decay rises with the number of updates n, so that the average of a short run has forgotten the first weights:
    it is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage with num_updates, or it rises along
    the ramp. The update of AveragedModel itself copies its counter to the device in every step, for which the host
    waits.

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
        rising = self.decay * (1 - math.exp(-(done + 1) / self.ramp)) if self.ramp else (1 + done) / (10 + done)
        decay = min(self.decay, rising) if done else 0.0
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
