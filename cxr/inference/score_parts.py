"""Parts of an archive are read on CPUs, scored and written on GPUs if there are any, on Ray Data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import ray.data

from cxr.data.ray_data import finished, map_blocks
from cxr.errors import UserError
from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import PART_BYTES, plan_inputs
from cxr.inference.plan_store import PlannedPart, StoredPlan
from cxr.inference.read import part_key
from cxr.inference.score_job import Job
from cxr.runtime import cluster, metrics
from cxr.runtime.progress import Progress
from cxr.runtime.step_times import NETWORKS

_PARTS_AT_ONCE = 3  # of a replica: one in the network, one becoming scores, one being written
_WAITING_PARTS = 4  # for each CPU and replica, that have been read or are being read: more would only fill memory


def score_parts(todo: Sequence[PlannedPart], job: Job, stored: StoredPlan, number: int, progress: Progress) -> None:
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
