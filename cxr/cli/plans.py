"""What a job asks of the cluster and how long it takes: all of it with `--plan`, in a line when any job starts.

Rates are measured, never assumed: each says where it comes from, and without one no time is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.cli.inputs import open_archive, training_images
from cxr.cli.options import RecipeOptions, TrainOptions, TuneOptions, check_described
from cxr.cli.plan_options import PlanOptions
from cxr.data import shards
from cxr.inference.options import ScoredSplit
from cxr.inference.panel import given_panel
from cxr.runtime import console
from cxr.runtime.progress import duration
from cxr.sources import open_manifest
from cxr.wording import counted

INGEST_RATE = 177.0  # images per second and CPU
INGEST_SOURCE = "docs/reference/performance.md: PNGs of 1024 px on two cores"
READ_RATE = 52.0  # images per second and CPU
READ_SOURCE = "docs/reference/performance.md: PNGs of 1024 px on two busy cores, decoded and resized"
_UNKNOWN_RATE = "no estimate: add --images-per-second, or use an --out with an earlier run"
_SHORT = ("asks for", "images", "epoch", "time")  # the lines of a plan that a job shows when it starts


@dataclass(frozen=True)
class Rate:
    """Images per second of one process, and where that was measured."""

    images_per_s: float
    source: str

    def __str__(self) -> str:
        return f"{self.images_per_s:.4g} images/s ({self.source})"


@dataclass
class JobPlan:
    """Lines of text by what they are about, and the same as values for programs."""

    lines: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{name:<{width}}  {said}" for name, said in self.lines.items())

    def short(self) -> str:
        """What a job says of itself when it starts."""
        return "plan: " + "; ".join(self.lines[name] for name in _SHORT if name in self.lines)

    def shown(self) -> tuple[dict[str, Any], str]:
        return {"plan": self.lines, **self.values}, self.text()


@dataclass(frozen=True)
class Capacity:
    """The CPUs and GPUs to plan for, and whose they are."""

    cpus: float
    gpus: float
    whose: str

    @classmethod
    def of(cls, options: PlanOptions) -> Capacity:
        """What the options say, else the cluster of this process or in RAY_ADDRESS, else this machine."""
        joined = not options.plan or os.environ.get("RAY_ADDRESS")
        if joined and None in (options.plan_cpus, options.plan_gpus):
            from cxr.runtime import cluster  # imports Ray

            cluster.connect()
            found = cluster.total("CPU"), cluster.total("GPU")
            whose = "the cluster, with machines that it may start"
        else:
            found, whose = (float(len(os.sched_getaffinity(0))), _gpus_here()), "this machine"
        given = [options.plan_cpus, options.plan_gpus]
        cpus, gpus = (float(own if own is not None else other) for own, other in zip(given, found, strict=True))
        return cls(cpus, gpus, whose if None in given else "from --plan-cpus and --plan-gpus")

    def total(self, resource: str) -> float:
        return {"CPU": self.cpus, "GPU": self.gpus}[resource]

    def __str__(self) -> str:
        return f"{counted(int(self.cpus), 'CPU')} and {counted(int(self.gpus), 'GPU')} ({self.whose})"


def _gpus_here() -> float:
    import torch

    return float(torch.cuda.device_count())


def plan_of(options: Any) -> tuple[dict[str, Any], str]:
    """What to show of a job with these options, as JSON and as text."""
    return _plan(options).shown()


def say_plan(options: Any, images: int | None = None) -> None:
    """Show the plan of a job that is about to start.

    Args:
        images: number of images that the job has counted, so that the archive is not listed again.
    """
    plan = _plan(options, images)
    console.event("plan", plan.short(), plan=plan.lines, **plan.values)


def _plan(options: Any, images: int | None = None) -> JobPlan:
    from cxr.cli.commands import ingest, score

    if isinstance(options, RecipeOptions):
        return plan_training(options, images)
    if isinstance(options, ingest.Options):
        return plan_ingest(options, images)
    assert isinstance(options, score.Options)
    return plan_scoring(options, images)


def plan_training(options: RecipeOptions, counted_images: int | None = None) -> JobPlan:
    """The plan of a training or of a search.

    Args:
        counted_images: `inputs.Inputs.images`, if the archive has been listed.

    Raises:
        UserError: the CPUs or GPUs to plan for can never hold the job.
    """
    from cxr.training.fit import check_batch, room, uses_gpu  # imports Ray
    from cxr.training.sweep import RUN_CPU
    from cxr.training.training_data import CACHE_BYTES

    recipe, run, archive = options.recipe, options.run, options.data
    check_batch(recipe, run)
    recipe.check_network()
    images, source, on_disk = _training_images(options, counted_images)
    capacity = Capacity.of(options.planning)
    by_ray = archive.stream or run.shard_reader == "ray"
    runs, kind, what = _runs(options)
    in_sweep = runs > 1 and not isinstance(options, TuneOptions)
    beside = RUN_CPU if in_sweep or run.max_workers > 1 else 0  # of the process that looks after a run or a trial
    fits = room(run, raw=by_ray, total=capacity.total, beside=beside)
    gpu = uses_gpu(run, capacity.total)
    at_once = min(fits, runs, getattr(getattr(options, "search", None), "max_concurrent_trials", None) or fits)
    steps = max(1, images // recipe.batch_size)
    image_bytes = archive.stored_size**2
    plan = JobPlan()
    number = f"{run.min_workers} to {run.max_workers}" if run.is_elastic else f"{run.max_workers:,}"
    processes = "process" if run.max_workers == 1 else "processes"
    plan.lines["asks for"] = (
        f"{f'{runs:,} {kind}, {at_once} at a time, each in ' * (runs > 1)}{number} training {processes}"
        f"{', each' * (run.max_workers > 1)} with {run.cpus_per_worker:g} CPU{'s' * (run.cpus_per_worker != 1)}"
        f"{' and 1 GPU' * gpu}"
        f"{', and a CPU for decoding' * by_ray}"
    )
    plan.lines["available"] = str(capacity)
    plan.lines["memory"] = (
        f"up to {CACHE_BYTES >> 20} MiB of pixels for each process, in addition to Python, PyTorch and the network"
    )
    plan.lines["disk"] = (
        f"shards in OUT of up to {_size(images * image_bytes)}"
        if not (on_disk or archive.stream)
        else "checkpoints only"
    )
    plan.lines["images"] = f"{images:,} images for training ({source})"
    plan.lines["epoch"] = f"{steps:,} steps of {recipe.batch_size} images over all processes"
    rate = _training_rate(options)
    if rate is None:
        plan.lines["time"] = _UNKNOWN_RATE
    else:
        seconds = images / (rate.images_per_s * run.max_workers)
        total = seconds * recipe.total_epochs * -(-runs // at_once)
        plan.lines["time"] = (
            f"{duration(seconds)} of training per epoch, {duration(total)} for {what}"
            f"{f', {at_once} at a time' * (runs > 1)}; validation and start-up not included"
        )
        plan.lines["rate"] = f"{rate} per process; speed is assumed to be proportional to the number of processes"
        plan.values |= {"epoch_seconds": seconds, "seconds": total}
    plan.values |= {"images": images, "steps": steps, "workers": run.max_workers, "runs_at_once": at_once}
    return plan


def _runs(options: RecipeOptions) -> tuple[int, str, str]:
    """How many networks a job trains, what several are called, and what all of the training is called."""
    epochs = counted(options.recipe.total_epochs, "epoch")
    if isinstance(options, TuneOptions):
        trials = options.search.trials
        return trials, "trials", f"{counted(trials, 'trial')} of {epochs} without early stopping"
    members = options.members if isinstance(options, TrainOptions) else 1
    folds = options.recipe.folds if options.recipe.fold is None and members == 1 else 0
    runs = max(members, folds or 1)
    return runs, "networks", epochs if runs == 1 else f"{runs} networks of {epochs} each"


def _training_images(options: RecipeOptions, counted_images: int | None) -> tuple[int, str, bool]:
    """Training images, who says so, and whether they are shards already."""
    archive, folds = options.data, options.recipe.folds
    check_described(archive.archive, archive.reading, archive.labeling)
    on_disk = bool(archive.uris) and all(map(shards.is_shards, archive.uris))
    if counted_images is not None:
        return counted_images, "listed in the archive", on_disk
    if options.planning.plan_images:
        count = options.planning.plan_images
        return count * (folds - 1) // folds if folds else count, "as given", on_disk
    if not archive.uris:
        return archive.phantoms, "the phantom archive, all splits", False
    opened = [open_archive(archive, uri) for uri in archive.uris]
    source = "the archive's folds" if folds else "the archive's train split"
    return training_images(opened, options.recipe), source, on_disk


def _training_rate(options: RecipeOptions) -> Rate | None:
    """Of one training process."""
    if options.planning.images_per_second:
        return Rate(options.planning.images_per_second, "--images-per-second")
    uri = storage.join(storage.normalize(options.out), "metrics.jsonl")
    rows = [json.loads(line) for line in storage.read_text(uri).splitlines()] if storage.exists(uri) else []
    rates = [row["images_per_s"] / row["workers"] for row in rows if "images_per_s" in row]
    return Rate(median(rates), f"median of {counted(len(rates), 'epoch')} in {uri}") if rates else None


def plan_ingest(options: Any, counted_images: int | None = None) -> JobPlan:
    """The plan of an ingest.

    Args:
        counted_images: those that are left to ingest, if the archive has been listed.
    """
    capacity = Capacity.of(options.planning)
    archives = (options.archive,) if options.archive else ()
    images, source = _all_images(archives, options.reading, "all", options.planning, counted_images, phantoms=60)
    images = min(images, options.limit or images)
    rate = _earlier(options, lambda result: result["images_per_second"] / capacity.cpus)
    rate = rate or Rate(INGEST_RATE, INGEST_SOURCE)
    plan = JobPlan()
    plan.lines["asks for"] = "all CPUs of the cluster, no GPU"
    plan.lines["available"] = str(capacity)
    plan.lines["disk"] = f"up to {_size(images * options.stored_size**2 * options.bits // 8)} in OUT"
    plan.lines["images"] = f"{images:,} images ({source})"
    _add_time(plan, images, {"reading and decoding": (rate, capacity.cpus, "CPU")})
    return plan


def plan_scoring(options: Any, counted_images: int | None = None) -> JobPlan:
    """The plan of scoring: CPUs read while replicas of the networks work, so the slower of the two counts.

    Args:
        counted_images: those that are left to score, if the archive has been listed and the checkpoints read.

    Raises:
        UserError: a checkpoint does not exist.
    """
    if counted_images is None:
        given_panel(options.panel, options.checkpoint)
    capacity = Capacity.of(options.planning)
    images, source = _all_images(
        options.archive, options.score.reading, options.score.split, options.planning, counted_images, phantoms=160
    )
    replicas = options.score.workers or int(capacity.gpus) or max(1, int(capacity.cpus) // 2)
    rate = _earlier(options, lambda result: result["metrics"]["images_per_s"] / replicas)
    plan = JobPlan()
    plan.lines["asks for"] = (
        f"{counted(replicas, 'replica')} of the networks, {'each with 1 GPU' if capacity.gpus else 'on CPUs'}, and "
        f"CPUs for reading"
    )
    plan.lines["available"] = str(capacity)
    plan.lines["images"] = f"{images:,} images ({source})"
    stages: dict[str, tuple[Rate, float, str]] = {}
    if not (options.archive and all(shards.is_shards(storage.normalize(uri)) for uri in options.archive)):
        stages["reading and decoding"] = Rate(READ_RATE, READ_SOURCE), capacity.cpus, "CPU"
    if rate:
        stages["networks"] = (rate, replicas, "replica")
    else:
        plan.lines["networks"] = _UNKNOWN_RATE
    _add_time(plan, images, stages, least=not rate)
    return plan


def _add_time(plan: JobPlan, images: int, stages: dict[str, tuple[Rate, float, str]], *, least: bool = False) -> None:
    """Add the time of each stage whose speed is known; stages run side by side.

    Args:
        least: another stage, of unknown speed, may take longer.
    """
    plan.values["images"] = images
    if not stages:
        plan.lines["time"] = "unknown"
        return
    seconds = {name: images / (rate.images_per_s * count) for name, (rate, count, _) in stages.items()}
    for name, (rate, count, unit) in stages.items():
        plan.lines[name] = f"{duration(seconds[name])} on {counted(int(count), unit)}; each {rate}"
    plan.lines["time"] = f"{'at least ' * least}{duration(max(seconds.values()))}, start-up not included"
    plan.values["seconds"] = max(seconds.values())


def _all_images(
    archives: tuple[str, ...],
    reading: Any,
    split: ScoredSplit,
    options: PlanOptions,
    counted_images: int | None,
    *,
    phantoms: int,
) -> tuple[int, str]:
    if counted_images is not None:
        return counted_images, "listed in the archive"
    if options.plan_images:
        return options.plan_images, "as given"
    if not archives:
        return phantoms, "the phantom archive"
    count, splits = 0, schema.SPLITS if split == "all" else (split,)
    for uri in map(storage.normalize, archives):
        if shards.is_shards(uri):
            count += sum(map(shards.read_info(uri).rows, splits))
        else:
            listed = open_manifest(uri, reading).table[schema.SPLIT]
            count += pc.sum(pc.is_in(listed, value_set=pa.array(splits))).as_py() or 0
    return count, "listed in the archive"


def _earlier(options: Any, rate: Callable[[dict[str, Any]], float]) -> Rate | None:
    """The rate that the options name, or that of an earlier run in OUT, on as much hardware as is planned for; None
    if that run had nothing to do."""
    if options.planning.images_per_second:
        return Rate(options.planning.images_per_second, "--images-per-second")
    uri = storage.join(storage.normalize(options.out), "result.json")
    if not storage.exists(uri):
        return None
    measured = rate(storage.read_json(uri))
    return Rate(measured, f"{uri}, if it ran on the same hardware") if measured else None


def _size(count: int) -> str:
    value = count / 1e9
    return f"{value:,.1f} GB" if value >= 0.1 else f"{count / 1e6:,.1f} MB"
