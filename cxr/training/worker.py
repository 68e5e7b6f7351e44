"""What each Ray Train worker runs: epochs of training and validation, checkpoints, resuming."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from cxr.data.batch import best_device
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files, recipe_from_dict
from cxr.families.base import Communicator, Recipe, SingleProcess, Stage
from cxr.families.capabilities import DegeneracyCheck
from cxr.runtime import console
from cxr.training import batch_norm
from cxr.training.checkpoint_average import averaged_network, best_kept
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine, EpochSoFar, UnrecoverableTrainingError
from cxr.training.options import CHECKPOINT_SCORE
from cxr.training.raw_stream import Stream, open_streams, share
from cxr.training.run_log import AVERAGE, GPU_SHARE, TIME, is_within_epoch
from cxr.training.session import InProcessSession, RayTrainSession, Session
from cxr.training.within_epoch import WithinEpoch, continue_within, state_within


@dataclass
class TrainingProgress:
    """How far a run has come, which decides when it ends; saved in resume.pt."""

    epoch: int = 0  # epochs finished
    best: float | None = None  # monitored metric of the best rankable epoch
    since_best: int = 0
    seconds: float = 0.0  # spent training so far, over all restarts
    averaged: tuple[int, int] = (0, 0)  # after which epoch networks were averaged, and of how many epochs

    def update(self, value: float | None, mode: str) -> None:
        """Count an epoch of the last stage. `value` is its monitored metric, or None if it is not rankable."""
        better = value is not None and (
            self.best is None or (value > self.best if mode == "max" else value < self.best)
        )
        self.best, self.since_best = (value, 0) if better else (self.best, self.since_best + 1)
        self.epoch += 1

    def done(self, recipe: Recipe) -> bool:
        return self.epoch >= recipe.total_epochs or 0 < recipe.patience <= self.since_best


@dataclass
class Worker:
    """One rank of a run."""

    recipe: Recipe
    config: dict[str, Any]
    workers: Communicator
    device: torch.device
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    session: Session = field(default_factory=RayTrainSession)
    within: dict[str, Any] | None = None  # what `state_within` returned, if the run resumes within an epoch

    def run(self) -> dict[str, Any]:
        """Train to the end. Returns why training failed, the same on every rank, if a restart would fail again."""
        torch.manual_seed(self.recipe.seed)
        try:
            train, val = open_streams(self.config["data"], self.recipe, self.workers, self.session)
            engine, resumed = self._engine(train)
            self._say_what_batches_affect(engine)
            if not resumed:
                engine.task.begin(lambda: engine.moved(train.every()), self.workers)
        except UserError as error:
            self._all_well(False)
            return {"misuse": str(error)}
        if not self._all_well(True):
            return {"misuse": "another worker could not be set up: see its log for the reason"}
        try:
            while not self.progress.done(self.recipe):
                stage = stage_at(self.recipe, self.progress.epoch)
                if engine.stage != stage:
                    engine.enter(stage)
                self._epoch(engine, train, val)
            self._average(engine, val)
        except UnrecoverableTrainingError as reason:
            return {"stopped": str(reason)}
        return {"epochs": self.progress.epoch, "best": self.progress.best}

    def _say_what_batches_affect(self, engine: Engine) -> None:
        """Print, once for all workers, how the number of workers and the batch size affect the result."""
        images = share(self.recipe, self.workers)
        notes = [batch_norm.note(engine.task.network, self.workers.size, images, self.device)]
        if self.recipe.lr_batch_size:
            notes.append(
                f"learning rates are multiplied by batch_size / lr_batch_size = {self.recipe.batch_size} / "
                f"{self.recipe.lr_batch_size} = {self.recipe.lr_factor:.4g} (linear scaling rule)"
            )
        for note in filter(None, notes if self.workers.rank == 0 else []):
            console.note(note)

    def _all_well(self, well: bool) -> bool:
        """Whether this holds on every worker; if one gave up alone, the others would wait for it."""
        return self.workers.sum(torch.tensor(float(well), device=self.device)).item() == self.workers.size

    def _engine(self, train: Stream) -> tuple[Engine, bool]:
        """The engine at the very beginning, or where the last checkpoint left it, and which of the two it is."""
        task = self.recipe.task(self.recipe.network(self.config["findings"]))
        previous = self.session.latest()
        state = self._resume_state(previous) if previous else None
        if state:
            self.progress, self.within = TrainingProgress(**state["progress"]), state["within"]
        ended = max(0, self.progress.epoch - 1)  # the epoch after which `state` was saved
        engine = Engine(
            task,
            self.recipe,
            self.workers,
            steps_per_epoch=train.steps,
            device=self.device,
            stage=stage_at(self.recipe, self.progress.epoch if self.within else ended),
            compiled=self.config["compile"],
        )
        if state:
            checkpoint.restore_task_state(task, state["task"])
            engine.restore(state["engine"])
        return engine, state is not None

    def _resume_state(self, previous: ray.train.Checkpoint) -> dict[str, Any]:
        """The state in a checkpoint from which training resumes.

        Raises:
            UserError: it was trained with other settings, or on other findings, or `resume.pt` holds Python objects.
        """
        with previous.as_directory() as folder:
            about = checkpoint_files.read_about(folder)
            checkpoint.check_same_settings(about, self.recipe, self.config["findings"])
            return checkpoint.read_resume(Path(folder))

    def _epoch(self, engine: Engine, train: Stream, val: Stream) -> None:
        """One epoch, or the rest of it, then a report; the seed depends on the epoch alone, so that a resumed run
        repeats it."""
        epoch = self.progress.epoch
        self._seed(epoch)
        so_far = EpochSoFar()
        if self.within:
            so_far, self.within = continue_within(engine, self.within, self.workers), None
        batches, before = train.train(epoch, engine.unneeded_batches(so_far)), so_far.seconds
        engine.device_time.taken()
        means = engine.epoch(batches, so_far, self._checkpoints(engine, train))
        gpu_share = engine.device_time.taken() / (so_far.seconds - before)
        start = time.monotonic()
        metrics = engine.finish_epoch(val.every)
        validated = time.monotonic() - start
        ranking = self._rank(metrics, in_last_stage=epoch >= self.recipe.unranked_epochs)
        if epoch < self.recipe.unranked_epochs:
            self.progress.epoch += 1
        else:
            self.progress.update(metrics[self.recipe.monitor] if ranking["rankable"] else None, self.recipe.mode)
        self.progress.seconds += so_far.seconds + validated
        report = {
            **self._described(engine.stage.name, metrics),
            **ranking,
            "images_per_s": means.pop("images") / so_far.seconds,
            "lr": engine.schedule.get_last_lr()[0],
            **shares_of_time(so_far, validated, engine.exchange_seconds() / self.recipe.accumulate),
            **({GPU_SHARE: gpu_share} if self.device.type == "cuda" else {}),
            **{f"train/{name}": value for name, value in means.items()},
        }
        self._report(engine, metrics, report)

    def _checkpoints(self, engine: Engine, train: Stream) -> WithinEpoch | None:
        """What saves the state within an epoch; None unless this process reads its own shards."""
        if not isinstance(train, ShardStream):
            return None
        steps = train.steps * engine.stage.data_echo_factor

        def write(so_far: EpochSoFar) -> None:
            report = {
                **self._described(engine.stage.name, {}),
                **self._rank({}, in_last_stage=False),
                "seconds": self.progress.seconds + so_far.seconds,
                "step": so_far.steps,
                "steps": steps,
            }
            within = state_within(engine, so_far, self.workers)
            self._report(engine, {}, report, resume=self._resume(engine) | {"within": within})

        return WithinEpoch(self.session, self.config.get("checkpoint_seconds", 0.0), write)

    def _seed(self, epoch: int) -> None:
        torch.manual_seed((self.recipe.seed * 1_000_003 + epoch) * 1_009 + self.workers.rank)

    def _described(self, stage: str, metrics: dict[str, float]) -> dict[str, Any]:
        """The common part of the reports of an epoch and of an average of epochs."""
        return {
            "epoch": self.progress.epoch,
            "epochs": self.recipe.total_epochs,
            "stage": stage,
            "seconds": self.progress.seconds,
            "workers": self.workers.size,
            **metrics,
            "applied": self.recipe.to_dict(),
        }

    def _average(self, engine: Engine, val: Stream) -> None:
        """Validate and report the mean of the best epochs' networks like one more epoch, unless that was done.

        Training can go on from its checkpoint as from the last epoch's.
        """
        due = (self.progress.epoch, self.config.get("average", 0))
        if not due[1] or self.progress.averaged == due:
            return
        best = best_kept(self.recipe, due[1], self.session.reported())
        if len(best) < 2:
            return
        self.progress.averaged = due
        resume = self._resume(engine)
        network = averaged_network([reported.checkpoint for reported in best], engine)
        self._seed(self.progress.epoch)
        metrics = engine.validated(network, val.every)
        report = {**self._described(AVERAGE, metrics), **self._rank(metrics, in_last_stage=True)}
        report["averaged"] = sorted(reported.metrics["epoch"] for reported in best)
        self._report(engine, metrics, report, network, resume)

    def _rank(self, metrics: dict[str, float], *, in_last_stage: bool) -> dict[str, Any]:
        """Whether this network competes for the best checkpoint, and why it is degenerate, if it is.

        Networks of earlier stages, degenerate ones and those without the monitored metric are not rankable.
        `CHECKPOINT_SCORE` only tells Ray Train which checkpoints to keep: it orders NaN below all numbers.
        """
        value = metrics.get(self.recipe.monitor, math.nan)
        reason = ""
        if in_last_stage and isinstance(self.recipe, DegeneracyCheck):
            reason = self.recipe.degenerate_reason(metrics)
        rankable = in_last_stage and not reason and math.isfinite(value)
        score = value if rankable else math.nan
        return {"rankable": rankable, CHECKPOINT_SCORE: score, **({"degenerate": reason} if reason else {})}

    def _resume(self, engine: Engine) -> dict[str, Any]:
        """The state that resuming from here needs."""
        return {
            "engine": engine.state(),
            "task": checkpoint.task_state(engine.task),
            "progress": vars(self.progress),
            "within": None,
        }

    def _report(
        self,
        engine: Engine,
        metrics: dict[str, float],
        report: dict[str, Any],
        average: nn.Module | None = None,
        resume: dict[str, Any] | None = None,
    ) -> None:
        """Hand the epoch, or its state so far, to the session, rank 0 with a checkpoint; ranks wait for each other.

        Args:
            average: the network to keep in place of the epoch's, and with it what going on needs.
        """
        epoch, count = self.progress.epoch, self.progress.averaged[1]
        name = f"epoch_{epoch:04d}" if average is None else f"{AVERAGE}_{epoch:04d}_of_{count}"
        if is_within_epoch(report):
            name += f"_step_{report['step']:06d}"
        if self.workers.rank > 0:
            self.session.report(report, None, name)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(
                Path(folder),
                self.recipe,
                engine.task,
                (engine.shipped() if average is None else average).state_dict(),
                findings=self.config["findings"],
                metrics=metrics,
                data=self.config.get("trained_on"),
                reading=self.config.get("reading"),
                resume=resume or self._resume(engine),
            )
            self.session.report(report, folder, name)


def shares_of_time(so_far: EpochSoFar, validated: float, exchange_s: float) -> dict[str, float]:
    """Fractions of an epoch's duration in which this worker waited for batches, computed, waited for the gradients of
    other workers, and validated.

    On a GPU, computing includes the time that the device still needs for steps that have been sent to it.

    Args:
        validated: seconds of validation.
        exchange_s: seconds of a step in which it waited for gradients.
    """
    computed = so_far.seconds - so_far.waited
    exchanged = min(exchange_s * so_far.steps, computed)
    seconds = {
        "data": so_far.waited,
        "compute": computed - exchanged,
        "gradients": exchanged,
        "validation": validated,
    }
    return {TIME + name: value / (so_far.seconds + validated) for name, value in seconds.items()}


def stage_at(recipe: Recipe, epoch: int) -> Stage:
    """The stage that epoch number `epoch`, from 0, belongs to; the last one for epochs beyond it."""
    for stage in recipe.stages():
        if epoch < stage.epochs:
            return stage
        epoch -= stage.epochs
    return recipe.stages()[-1]


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train calls on every worker; `config` is plain JSON-like data."""
    recipe = recipe_from_dict(config["recipe"])
    context = ray.train.get_context()
    workers = ProcessGroup() if context.get_world_size() > 1 else SingleProcess()
    # Under resources that only pretend to be GPUs, Ray names a device that torch cannot see.
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, int(config["threads"])))
    return Worker(recipe, config, workers, device).run()


def train_in_process(config: dict[str, Any], session: InProcessSession) -> dict[str, Any]:
    """Train as the only worker, in this process and on its first GPU, if it has one; returns what `Worker.run`
    does."""
    torch.set_num_threads(max(1, int(config["threads"])))
    recipe = recipe_from_dict(config["recipe"])
    return Worker(recipe, config, SingleProcess(), best_device(), session=session).run()
