"""fit(): one training run on Ray Train, from any archive to a checkpoint at any URI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from cxr import checkpoint, cluster, dataset, shards, storage
from cxr.errors import UserError
from cxr.recipes.base import Recipe, check_size
from cxr.train.log import RunLog, best_row, read_metrics
from cxr.train.options import RunOptions
from cxr.train.worker import train_worker

CACHE_BYTES = 1 << 30  # of pixels that each worker keeps in memory


class TrainingStopped(RuntimeError):
    """Training could not go on; the message says why. Checkpoints of earlier epochs are kept."""


@dataclass(frozen=True)
class Fitted:
    """What a run gave: the best epoch's checkpoint and metrics, and how many epochs were trained."""

    checkpoint: str
    metrics: dict[str, float]
    epochs: int


def fit(
    recipe: Recipe,
    archive: str,
    out: str,
    options: RunOptions | None = None,
    *,
    source: str = "auto",
    name: str = "train",
    callbacks: Sequence[UserCallback] = (),
) -> Fitted:
    """Train `recipe` on the train split of `archive` (shards, or a raw archive), validating on its val split.

    Writes OUT/checkpoint (the best), OUT/NAME/epoch_* (best and last, for resuming), OUT/metrics.jsonl and
    OUT/tensorboard. Call `recipe.resolved()` first: workers apply the recipe as it is.

    Raises:
        UserError: OUT holds a run already and `options.resume` is off, or holds none and it is on.
        TrainingStopped: a loss term stopped being finite, or an epoch gave no batch.
        ray.train.TrainingFailedError: workers died more often than `options.max_failures`.
    """
    options = options or RunOptions()
    out = storage.normalise(out)
    _check_resume(storage.join(out, name), options.resume)
    _check_batch(recipe, options)
    data, findings, datasets = _describe(archive, recipe, source)
    room(options, raw=bool(datasets))
    gpu = uses_gpu(options)
    config = {
        "recipe": recipe.to_dict(),
        "findings": list(findings),
        "data": data,
        "compile": options.compile,
        "threads": options.cpus_per_worker,
    }
    trainer = Trainer(
        train_worker,
        train_loop_config=config,
        scaling_config=_scaling(options, gpu),
        run_config=_run_config(recipe, out, name, options, callbacks),
        datasets=datasets,
        dataset_config=EachRowOnce() if datasets else None,
    )
    return _finish(trainer.fit(), recipe, out, name)


def _check_resume(run: str, resume: bool) -> None:
    if storage.exists(run) and not resume:
        raise UserError(f"{run} holds a run already: give --resume to go on with it, or another --out")
    if resume and not storage.exists(run):
        raise UserError(
            f"{run} holds no run to resume: give the --out of the run to go on with, or leave --resume out"
        )


def _check_batch(recipe: Recipe, options: RunOptions) -> None:
    if options.min_workers is None and recipe.batch_size % options.workers:
        raise UserError(
            f"batch_size={recipe.batch_size} cannot be shared equally by {options.workers} workers: "
            f"give a multiple of {options.workers}"
        )


def uses_gpu(options: RunOptions) -> bool:
    """Whether workers train on GPUs, one each."""
    return options.device == "gpu" or (options.device == "auto" and cluster.total("GPU") > 0)


def room(options: RunOptions, *, raw: bool, beside: float = 0.0) -> int:
    """How many runs with these options the cluster can hold at once, machines counted that it may still start.

    Args:
        raw: a raw archive is streamed, for which a CPU must stay free.
        beside: CPUs that each run takes besides its workers'.

    Raises:
        UserError: not even one.
    """
    workers, cpus, gpus = options.min_workers or options.workers, cluster.total("CPU"), cluster.total("GPU")
    fits = math.floor((cpus - raw) / (workers * options.resources_per_worker["CPU"] + beside))
    if uses_gpu(options):
        fits = min(fits, math.floor(gpus / workers))
    if fits < 1:
        raise UserError(
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs: too few for a run of {workers} workers with "
            f"{options.cpus_per_worker:g} CPUs{' and a GPU' * uses_gpu(options)} each"
            f"{', and a CPU for decoding' * raw}. Lower --workers or --cpus-per-worker, or add machines"
        )
    return fits


def _describe(archive: str, recipe: Recipe, source: str) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """What workers must know of the data; for a raw archive also the Ray Data streams they share."""
    archive = storage.normalise(archive)
    if shards.is_shards(archive):
        info = shards.read_info(archive)
        if min(info.rows("train"), info.rows("val")) == 0:
            raise UserError(f"{archive} has no images in its train or its val split: nothing to train on")
        check_size(recipe, info.pixels.size)
        return {"shards": archive, "cache_bytes": CACHE_BYTES}, info.findings, {}
    datasets, findings, rows = dataset.open_streams(archive, recipe.size, source)
    return {"rows": rows}, findings, datasets


def _run_config(
    recipe: Recipe, out: str, name: str, options: RunOptions, callbacks: Sequence[UserCallback]
) -> RunConfig:
    kept = CheckpointConfig(
        num_to_keep=options.keep,
        checkpoint_score_attribute=recipe.monitor,
        checkpoint_score_order=recipe.mode,
    )
    return RunConfig(
        name=name,
        storage_path=out,
        failure_config=FailureConfig(max_failures=options.max_failures),
        checkpoint_config=kept,
        callbacks=[RunLog(out, name, recipe.monitor), *callbacks],
    )


def _scaling(options: RunOptions, gpu: bool) -> ScalingConfig:
    workers = options.workers if options.min_workers is None else (options.min_workers, options.workers)
    return ScalingConfig(
        num_workers=workers,
        use_gpu=gpu,
        resources_per_worker=options.resources_per_worker | ({"GPU": 1} if gpu else {}),
    )


def _finish(result: ray.train.Result, recipe: Recipe, out: str, name: str) -> Fitted:
    """Put the best checkpoint at OUT/checkpoint, where it is found without knowing the epoch."""
    returned = result.return_value or {}
    if "misuse" in returned:
        raise UserError(returned["misuse"])
    if "stopped" in returned:
        raise TrainingStopped(returned["stopped"])
    rows = read_metrics(out)
    best = best_row(rows, recipe)
    if best is None:
        raise TrainingStopped(f"{recipe.monitor} was NaN in every epoch: is there anything to measure it by?")
    kept = checkpoint.copy_for_scoring(storage.join(out, name, best["checkpoint"]), storage.join(out, "checkpoint"))
    return Fitted(kept, checkpoint.read_about(kept)["metrics"], rows[-1]["epoch"])


class Trainer(TorchTrainer):
    """A TorchTrainer that leaves Ctrl-C to the job: Ray's own handler would end it with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class EachRowOnce(DataConfig):
    """Deals train rows in equal shares, so that workers step alike, and every other split whole: no row is lost."""

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> Any:
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for split, rows in datasets.items():
            rows.context.execution_options = self._resolve_execution_options(split)
            parts = rows.streaming_split(world_size, equal=split == "train", locality_hints=worker_node_ids)
            for share, part in zip(shares, parts, strict=True):
                share[split] = part
        return shares
