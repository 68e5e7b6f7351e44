"""fit(): one training run on Ray Train, from any archive to a checkpoint at any URI."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
from ray.data import Dataset
from ray.train import (
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from cxr import storage
from cxr.errors import ClusterError, UserError
from cxr.families import checkpoint_files
from cxr.families.base import Recipe
from cxr.runtime import cluster, ray_private
from cxr.runtime.user_errors import PROCESS_DEATHS, is_death, user_error_in
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling, ReadOptions
from cxr.training.mlflow_log import MlflowLog
from cxr.training.options import CHECKPOINT_SCORE, RunOptions, check_resume
from cxr.training.restarts import RestartNotes
from cxr.training.run_log import RunLog, best_row, read_in_progress, read_metrics
from cxr.training.session import InProcessSession
from cxr.training.training_data import TrainingData, describe
from cxr.training.worker import train_in_process, train_worker


class TrainingStoppedError(RuntimeError):
    """Training cannot continue; the message says why. Checkpoints of earlier epochs are kept."""


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
    reading: ReadOptions = ALL_IMAGES,
    labeling: Labeling = SOURCE_LABELS,
    name: str = "train",
    callbacks: Sequence[UserCallback] = (),
    resume: bool = False,
    in_process: bool = False,
    show_epochs: bool = True,
    label: str = "",
    search_log: MlflowLog | None = None,
    selections: str = "",
) -> Fitted:
    """Train `recipe` on the train split of `archive` (shards, or a raw archive), validating on its val split; or, in
    folds, on all of these two splits' patients but one fold, which validates.

    Writes OUT/checkpoint (the best), OUT/NAME/epoch_* (best and last, for resuming) and average_*, OUT/metrics.jsonl
    and OUT/tensorboard. Call `recipe.resolve_weights(out)` first, or `resume_from`: workers apply the recipe as it
    is, and read weights from URIs alone.

    Args:
        labeling: labels and boxes for a raw archive, if not its own.
        resume: continue the run in `out`.
        in_process: train in this process, which must hold the resources of a worker, instead of in a worker group;
            for one worker. Whoever started the process starts it again if it dies.
        show_epochs: show a line for each epoch; for several runs at the same time, leave them to programs.
        label: with which the lines of epochs start; `name` by default.
        search_log: the MLflow log of the search that this run is a trial of.
        selections: what `training_data.select_images` stored for several runs; by default it is stored for this one.

    Raises:
        UserError: the recipe names weights other than by URI; OUT contains a run and `resume` is off, or it contains
            none and `resume` is on; storage kept failing beyond all retries.
        TrainingStoppedError: a loss term stopped being finite, or an epoch gave no batch.
        ClusterError: workers died more often than `options.max_failures`.
    """
    options = options or RunOptions()
    out = storage.normalize(out)
    _check_weights(recipe)
    check_resume(storage.join(out, name), resume)
    check_batch(recipe, options)
    data = describe(archive, recipe, out, reading, labeling, options.shard_reader, selections)
    room(options, raw=bool(data.streams))
    datasets = data.datasets(recipe.seed, out)
    config = _worker_config(recipe, data, reading, options)
    settings = {"archive": archive, **asdict(options)}
    with MlflowLog.begin(out, recipe, settings, search_log) as tracked:
        log = RunLog(out, label or name, recipe.monitor, show=show_epochs, by_ray=bool(datasets))
        callbacks = [log, tracked, *callbacks]
        if in_process:
            assert options.max_workers == 1
            keep = options.num_to_keep
            session = InProcessSession(out, name, recipe.monitor, recipe.mode, keep, callbacks, datasets)
            returned = train_in_process(config, session)
        else:
            callbacks += [RestartNotes(label or name)] if show_epochs else []
            trainer = _trainer(config, datasets, options, _run_config(recipe, out, name, options, callbacks))
            returned = _result(trainer, options).return_value or {}
        fitted = _finish(returned, recipe, out, name)
        tracked.send_best(fitted.metrics, fitted.checkpoint)
        return fitted


def _check_weights(recipe: Recipe) -> None:
    if recipe.unresolved_weights:
        raise UserError(
            f"{', '.join(recipe.unresolved_weights)}: expected the URI of weights; call recipe.resolve_weights(out) "
            f"before fit"
        )


def _worker_config(recipe: Recipe, data: TrainingData, reading: ReadOptions, options: RunOptions) -> dict[str, Any]:
    """The `train_loop_config` of the workers."""
    return {
        "recipe": recipe.to_dict(),
        "findings": list(data.findings),
        "data": data.about,
        "trained_on": data.trained_on,
        "reading": reading.describe(),
        "compile": options.compile,
        "average": options.average_checkpoints,
        "threads": options.cpus_per_worker,
        "checkpoint_seconds": options.checkpoint_seconds,
    }


def begun_with(out: str, name: str = "train") -> dict[str, Any] | None:
    """The settings, as `Recipe.to_dict` gives them, of the checkpoint from which the run in OUT/NAME would resume.

    None if there is no checkpoint, so that training starts from the beginning.
    """
    rows = [*read_metrics(out), *filter(None, [read_in_progress(out)])]
    last = storage.join(out, name, rows[-1]["checkpoint"]) if rows else ""
    there = bool(last) and storage.exists(storage.join(last, checkpoint_files.ABOUT))
    return checkpoint_files.read_about(last)["recipe"] if there else None


def check_batch(recipe: Recipe, options: RunOptions) -> None:
    """Raise UserError unless the workers can share a batch equally."""
    if not options.is_elastic and recipe.batch_size % options.max_workers:
        raise UserError(
            f"batch_size={recipe.batch_size} cannot be shared equally by {options.max_workers} workers: "
            f"use a multiple of {options.max_workers}"
        )


Total = Callable[[str], float]
"""The CPUs or GPUs of a cluster, like `cluster.total`."""


def uses_gpu(options: RunOptions, total: Total | None = None) -> bool:
    """Whether workers train on GPUs, one each."""
    return options.device == "gpu" or (options.device == "auto" and (total or cluster.total)("GPU") > 0)


def room(options: RunOptions, *, raw: bool, beside: float = 0.0, total: Total | None = None) -> int:
    """How many runs with these options the cluster can hold at once, machines counted that it may still start.

    Args:
        raw: a raw archive is streamed, for which a CPU must stay free.
        beside: CPUs that each run takes besides its workers'.
        total: resources to count in place of the cluster's.

    Raises:
        UserError: not even one.
    """
    count = total or cluster.total
    workers, cpus, gpus, on_gpus = options.min_workers, count("CPU"), count("GPU"), uses_gpu(options, total)
    if on_gpus and gpus < workers:
        remedy = (
            f"use --workers {gpus:g}, or --device cpu" if gpus else "use --device cpu, or use a cluster with GPUs"
        )
        raise UserError(f"expected {workers} GPUs, one for each worker, got a cluster with {gpus:g}: {remedy}")
    fits = math.floor((cpus - raw) / (workers * options.resources_per_worker["CPU"] + beside))
    if on_gpus:
        fits = min(fits, math.floor(gpus / workers))
    if fits < 1:
        raise UserError(
            f"the cluster has {cpus:g} CPUs: too few for a run of {workers} workers with {options.cpus_per_worker:g} "
            f"CPUs each{', and a CPU for decoding' * raw}. Lower --workers or --cpus-per-worker, or add machines"
        )
    needed = options.resources_per_worker | ({"GPU": 1.0} if on_gpus else {})
    if total is None and not cluster.has_machine_for(needed):
        raise UserError(
            f"no machine of the cluster has {options.cpus_per_worker:g} CPUs{' and a GPU' * on_gpus} for a worker: "
            f"lower --cpus-per-worker, or add larger machines"
        )
    return fits


def _trainer(
    config: dict[str, Any],
    datasets: dict[str, Callable[[], Dataset]],
    options: RunOptions,
    run_config: RunConfig,
) -> TorchTrainer:
    return ray_private.torch_trainer(
        train_worker,
        train_loop_config=config,
        scaling_config=_scaling(options, uses_gpu(options)),
        run_config=run_config,
        datasets=datasets,
        dataset_config=ExactlyOnceDataConfig() if datasets else None,
    )


def _run_config(
    recipe: Recipe, out: str, name: str, options: RunOptions, callbacks: Sequence[UserCallback]
) -> RunConfig:
    checkpoints = CheckpointConfig(
        num_to_keep=options.num_to_keep,
        checkpoint_score_attribute=CHECKPOINT_SCORE,
        checkpoint_score_order=recipe.mode,
    )
    path, files = storage.ray_storage(out)
    return RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=files,
        failure_config=FailureConfig(
            max_failures=options.max_failures, max_preemption_failures=options.max_preemption_failures
        ),
        checkpoint_config=checkpoints,
        callbacks=list(callbacks),
    )


def _scaling(options: RunOptions, gpu: bool) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(options.min_workers, options.max_workers) if options.is_elastic else options.max_workers,
        use_gpu=gpu,
        resources_per_worker=options.resources_per_worker | ({"GPU": 1} if gpu else {}),
    )


def _result(trainer: TorchTrainer, options: RunOptions) -> ray.train.Result:
    advice = (
        "Finished epochs are saved: run the same command again to continue (cxr train and cxr tune: with --resume)"
    )
    try:
        return trainer.fit()
    except PROCESS_DEATHS as error:
        raise ClusterError(
            f"the process that controls training died ({type(error).__name__}). Most likely the head node is short "
            f"of memory: check it. {advice}"
        ) from error
    except TrainingFailedError as error:
        failures = _failures(error)
        if mistake := next(filter(None, map(user_error_in, failures)), None):
            raise UserError(f"{mistake}. {advice}") from error
        if any(map(is_death, failures)):
            raise ClusterError(
                f"training processes died more often than the {options.max_failures} times that --max-failures "
                f"allows. Most likely machines were lost, or one is short of memory: check them. {advice}"
            ) from error
        raise


def _failures(error: TrainingFailedError) -> list[Any]:
    """What went wrong in each worker, or in the process that controls them."""
    return [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]


def _finish(returned: Mapping[str, Any], recipe: Recipe, out: str, name: str) -> Fitted:
    """Put the best checkpoint at OUT/checkpoint, where it is found without knowing the epoch."""
    if "misuse" in returned:
        raise UserError(returned["misuse"])
    if "stopped" in returned:
        raise TrainingStoppedError(returned["stopped"])
    rows = read_metrics(out)
    best = best_row(rows, recipe)
    if best is None:
        degenerate = rows[-1].get("degenerate") if rows else None
        if degenerate:
            raise TrainingStoppedError(
                f"no epoch produced a usable network; the last one is degenerate ({degenerate}): change the "
                f"settings, for example lower lr"
            )
        raise TrainingStoppedError(
            f"{recipe.monitor} could not be measured in any epoch: check that the validation images have the labels, "
            f"boxes or masks that it needs"
        )
    uri = checkpoint_files.copy_for_scoring(
        storage.join(out, name, best["checkpoint"]), storage.join(out, "checkpoint")
    )
    return Fitted(uri, checkpoint_files.read_about(uri)["metrics"], rows[-1]["epoch"])


class ExactlyOnceDataConfig(DataConfig):
    """Deals train rows in equal shares, so that workers step alike, and every other split whole: no row is lost.

    The order is the same in every run with as many workers.
    """

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> Any:
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for split, rows in datasets.items():
            options = ray_private.execution_options(self, split)
            options.preserve_order = True
            rows.context.execution_options = options
            parts = rows.streaming_split(world_size, equal=split == "train", locality_hints=worker_node_ids)
            for share, part in zip(shares, parts, strict=True):
                share[split] = part
        return shares
