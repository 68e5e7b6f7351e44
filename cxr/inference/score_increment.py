"""Score the planned parts of an increment on Ray Data, each exactly once, and commit it to the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray.data

from cxr import storage
from cxr.data.identity import Identity
from cxr.data.ledger import SUFFIX
from cxr.data.ray_data import finished, map_blocks
from cxr.data.run_ledger import INCREMENTS, UNFINISHED, Increment, RunLedger
from cxr.errors import UserError
from cxr.families.checkpoint import Checkpoint
from cxr.inference.joined_parts import join_parts
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import PART_BYTES, plan_inputs
from cxr.inference.plan_store import Left, PlannedPart, PlanStore, StoredPlan
from cxr.inference.read import part_key
from cxr.runtime import cluster, metrics, provenance
from cxr.runtime.console import say
from cxr.runtime.progress import Progress
from cxr.runtime.step_times import NETWORKS

_PARTS_AT_ONCE = 3  # of a replica: one in the network, one becoming scores, one being written
_WAITING_PARTS = 4  # for each CPU and replica, that have been read or are being read: more would only fill memory
_REASONS = 1000  # different errors that the ledger lists


@dataclass(frozen=True)
class Job:
    """What is scored, with what, and where the results go."""

    archives: list[str]
    panel: Panel
    models: dict[str, Checkpoint]
    out: str
    options: ScoreOptions
    settings: dict[str, Any]
    """Everything that scores depend on."""
    deadline: float | None
    """Seconds since 1970."""
    identity: Identity | None
    """Replaces ids and paths; None keeps them."""
    named: list[pa.Table]
    """Gets the ids and paths of the images as soon as they are known."""
    on_start: Callable[[int], object]
    """Called with the number of images that are left, before the first one."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of scores that this run has committed, by its path in OUT."""

    def plans(self, run: RunLedger) -> PlanStore:
        """The stored plans of the run. With pseudonyms, they are beside the crosswalk."""
        if self.identity is None:
            return PlanStore(self.out, storage.join(self.out, INCREMENTS))
        return PlanStore(self.out, storage.join(self.identity.private_folder, INCREMENTS, run.id), self.identity)

    def show_notes(self, notes: Iterable[str], rows: Iterable[pa.Table]) -> None:
        """Print notes on an archive whose images have these ids and paths."""
        rows = [*rows]
        self.named.extend(rows)
        for line in notes:
            print(f"note: {self.identity.hide(line, rows) if self.identity else line}", flush=True)


def score_increment(job: Job, run: RunLedger) -> RunLedger:
    """Score the missing parts of the open increment, and commit it; returns the ledger with it."""
    generation = run.generations[-1]
    planned = generation.open
    assert planned
    plans = job.plans(run).read(planned.number)
    parts = [part for plan in plans for part in plan.parts]
    done = _written(job.out, parts)
    progress = Progress("scored", _images(parts), done=_images(part for part in parts if part.name in done))
    if len(done) < len(parts):
        cluster.connect()
        check_shared(job.out, job.identity)
        job.on_start(progress.total - progress.done)
        for plan in plans:
            _score_parts([part for part in plan.parts if part.name not in done], job, plan, planned.number, progress)
        done = _written(job.out, parts)
    paces = progress.images_per_second, progress.steady_images_per_second
    if parts:
        progress.show()
    scored, left = ([part for part in parts if (part.name in done) == is_done] for is_done in (True, False))
    if left:
        say(f"stopped for --until {job.options.until}: {_images(left):,} images are left for the next run")
    joined = join_parts(job.out, planned.number, scored)
    if left or joined.unread:
        job.plans(run).write_left(planned.number, Left([part.number for part in left], joined.unread))
    increment = Increment(
        number=planned.number,
        files=joined.files,
        images=_images(scored),
        new=planned.new,
        changed=planned.changed,
        unchanged=planned.unchanged,
        removed=planned.removed,
        moved=planned.moved,
        remaining=_images(left),
        unread=len(joined.unread),
        rejects=joined.counts.reasons.total(),
        reasons=dict(joined.counts.reasons.most_common(_REASONS)),
        not_frontal_chest=dict(joined.counts.not_frontal_chest.most_common()),
        committed=now(),
        images_per_s=round(paces[0], 1),
        steady_images_per_s=round(paces[1], 1),
        cxr=provenance.versions()["cxr"],
    )
    run = run.with_latest(increments=(*generation.increments, increment), open=None)
    run.write()
    storage.delete(storage.join(job.out, UNFINISHED))
    job.files.update({uri.removeprefix(f"{job.out}/"): sha256 for uri, sha256 in joined.sha256.items()})
    return run


def now() -> str:
    """The local time, as the ledger records it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _written(out: str, parts: Sequence[PlannedPart]) -> set[str]:
    """Names of these parts that have been written."""
    try:
        files = {f"{UNFINISHED}/{file.path}" for file in storage.list_files(storage.join(out, UNFINISHED))}
    except storage.NotFoundError:
        return set()
    return {part.name for part in parts if part.name + SUFFIX in files}


def _images(parts: Iterable[PlannedPart]) -> int:
    return sum(part.images for part in parts)


def _score_parts(todo: Sequence[PlannedPart], job: Job, stored: StoredPlan, number: int, progress: Progress) -> None:
    """Read parts on CPUs, score and write them on GPUs if there are any; only counts return.

    Each replica has a few parts at a time, so that its network never waits for what is made of predictions, and no
    more than these, so that reading waits for it. Networks on CPUs use all of them between parts that are read.
    """
    if not todo:
        return
    gpus = int(cluster.total("GPU"))
    share = min(1.0, cluster.smallest("CPU") / 2)  # CPUs per task: one machine has room for reading and scoring
    workers = job.options.workers or gpus or max(1, int(cluster.total("CPU")) // 2)
    cpu_threads = max(1, int(cluster.total("CPU")) // workers)
    plan = plan_inputs(stored.origin, job.models)
    reader = replace(plan.reader(job.options.reading.gate), identity=job.identity, deadline=job.deadline)
    keys = [part_key(part.name, part.images, part.plan, part.row_group) for part in todo]
    tables = map_blocks(ray.data.from_arrow(keys), reader.planned_rows, num_cpus=share)
    replies = map_blocks(
        tables,
        PartScorer,
        pool=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=_PARTS_AT_ONCE,
            max_tasks_in_flight_per_actor=_PARTS_AT_ONCE + 1,
        ),
        fn_constructor_args=(job.panel, job.out, plan, job.options, cpu_threads, job.deadline, number),
        num_cpus=share,
        num_gpus=1 if gpus else None,
    )
    waiting = _WAITING_PARTS * (int(cluster.total("CPU")) + workers) * PART_BYTES
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=waiting)
    replies.context.execution_options.resource_limits = limits
    busy = metrics.GpuShare(job.out, min(gpus, workers))
    try:
        for row in finished(replies, [part.name for part in todo]):
            seconds = json.loads(row["seconds"])
            progress.add(row["images"], len(row["errors"]), seconds)
            metrics.count_reasons("scored", row["errors"])
            if gpus:
                busy.add(seconds.get(NETWORKS, 0.0))
    except UserError as mistake:
        raise UserError(f"{mistake}. Scored parts are saved: run the same command again to continue") from mistake


def check_shared(out: str, identity: Identity | None) -> None:
    """Raise UserError if results or the crosswalk lie on a disk that machines of the cluster do not share."""
    cluster.check_shared(out)
    if identity:
        cluster.check_shared(identity.crosswalk)
