"""Score the planned parts of an increment on Ray Data, each exactly once, and commit it to the ledger."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray.data

from cxr import storage
from cxr.data.identity import Identity
from cxr.data.ledger import SUFFIX, Ledger, Part, fingerprint
from cxr.data.ray_data import finished, map_blocks
from cxr.data.run_ledger import INCREMENTS, Increment, RunLedger, folder_of
from cxr.errors import UserError
from cxr.families.checkpoint import Checkpoint
from cxr.inference.increments import PlanStore
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.part_scorer import PartScorer, ScoreCounts, read_counts
from cxr.inference.plan import Plan
from cxr.inference.read import PART, PART_ROWS, SHARD
from cxr.runtime import cluster, metrics, provenance
from cxr.runtime.console import say
from cxr.runtime.progress import Progress
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION

_PARTS_AT_ONCE = 3  # of a replica: one in the network, one becoming scores, one being written
_REASONS = 1000  # different errors that the ledger lists
_THREADS = 16  # that read the ends of finished files


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
    total: ScoreCounts = field(default_factory=ScoreCounts)
    """Of all increments that this run scores."""

    @property
    def plans(self) -> PlanStore:
        if self.identity is None:
            return PlanStore(self.out, storage.join(self.out, INCREMENTS))
        of_out = hashlib.sha256(self.out.encode()).hexdigest()[:16]
        return PlanStore(self.out, storage.join(self.identity.private_folder, INCREMENTS, of_out), self.identity)

    def fingerprint(self, parts: Sequence[Part]) -> str:
        """See `data.ledger.fingerprint`. With pseudonyms, it is keyed, so that nobody can test guesses of the ids."""
        digest = fingerprint(Part(part.name, manifest_rows(part)) for part in parts)
        return str(self.identity.pseudonyms.of("fingerprint", digest.encode())) if self.identity else digest

    def show_notes(self, notes: Iterable[str], rows: Iterable[pa.Table]) -> None:
        """Print notes on an archive whose images have these ids and paths."""
        rows = [*rows]
        self.named.extend(rows)
        for line in notes:
            print(f"note: {self.identity.hide(line, rows) if self.identity else line}", flush=True)


def score_increment(job: Job, run: RunLedger, plans: Sequence[Plan]) -> Increment:
    """Score the missing parts of the open increment, and commit it."""
    generation = run.generations[-1]
    planned = generation.open
    assert planned
    parts = [part for plan in plans for part in plan.parts]
    done = {part.name for part in parts} & written_parts(job.out, planned.number)
    counts = ScoreCounts()
    with ThreadPoolExecutor(_THREADS) as pool:
        for written in pool.map(read_counts, [storage.join(job.out, name + SUFFIX) for name in sorted(done)]):
            counts.update(written)
            job.total.update(written)
    progress = Progress("scored", count_images(parts), done=count_images(part for part in parts if part.name in done))
    if len(done) < len(parts):
        cluster.connect()
        check_shared(job.out, job.identity)
        for plan in plans:
            todo = [part for part in plan.parts if part.name not in done]
            done |= _score_parts(todo, job, plan, progress, counts)
    if parts:
        progress.show()
    left = [part for part in parts if part.name not in done]
    if left:
        say(f"stopped for --until {job.options.until}: {count_images(left):,} images are left for the next run")
        job.plans.shorten(planned.number, done)
    increment = Increment(
        number=planned.number,
        parts=len(done),
        images=progress.done,
        new=planned.new,
        changed=planned.changed,
        unchanged=planned.unchanged,
        removed=planned.removed,
        moved=planned.moved,
        remaining=count_images(left),
        rejects=counts.reasons.total(),
        reasons=dict(counts.reasons.most_common(_REASONS)),
        not_frontal_chest=dict(counts.not_frontal_chest.most_common()),
        committed=now(),
        images_per_s=round(progress.images_per_second, 1),
        cxr=provenance.versions()["cxr"],
    )
    committed = (increment,) if done or increment.removed or increment.moved else ()
    run.with_latest(increments=(*generation.increments, *committed), open=None).write()
    return increment


def written_parts(out: str, number: int) -> set[str]:
    """Names of the parts of an increment that have been written."""
    folder = folder_of(number)
    try:
        files = list(storage.list_files(storage.join(out, folder)))
    except storage.NotFoundError:
        return set()
    return {f"{folder}/{file.path}".removesuffix(SUFFIX) for file in files}


def manifest_rows(part: Part) -> pa.Table:
    """A part's rows of the manifest, without the versions of their files."""
    return part.rows.drop_columns([name for name in (FILE_BYTES, FILE_VERSION) if name in part.rows.column_names])


def now() -> str:
    """The local time, as the ledger records it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def count_images(parts: Iterable[Part]) -> int:
    """The number of images of some parts."""
    return sum(part.rows[PART_ROWS][0].as_py() if is_shard(part) else part.rows.num_rows for part in parts)


def is_shard(part: Part) -> bool:
    """Whether a part is a shard file, and not images of a manifest."""
    return SHARD in part.rows.column_names


def _score_parts(todo: list[Part], job: Job, plan: Plan, progress: Progress, counts: ScoreCounts) -> set[str]:
    """Read parts on CPUs, score and write them on GPUs if there are any; only counts return, into `counts`.

    Each replica has a few parts at a time, so that its network never waits for what is made of predictions, and no
    more than these, so that reading waits for it. Networks on CPUs use all of them between parts that are read.

    Returns:
        The names of the parts that have been scored: all, unless there is a deadline.
    """
    if not todo:
        return set()
    gpus = int(cluster.total("GPU"))
    share = min(1.0, cluster.total("CPU") / 2)  # CPUs per task: reading and scoring must both fit into the cluster
    workers = job.options.workers or gpus or max(1, int(cluster.total("CPU")) // 2)
    cpu_threads = max(1, int(cluster.total("CPU")) // workers)
    parts, plan = [_labeled(part) for part in todo], replace(plan, parts=[])
    read = replace(plan.reader(job.options.reading.gate), identity=job.identity, deadline=job.deadline)
    tables = map_blocks(ray.data.from_arrow(parts), read.labeled_rows, num_cpus=share)
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
        fn_constructor_args=(job.panel, Ledger(job.out), plan, job.options, cpu_threads, job.deadline),
        num_cpus=share,
        num_gpus=1 if gpus else None,
    )
    scored: set[str] = set()
    try:
        for row in finished(replies, [part.name for part in todo]):
            if row["scored"]:
                scored.add(row["name"])
                job.total.files[row["name"] + SUFFIX] = row["sha256"]
                for each in (counts, job.total):
                    each.reasons.update(row["errors"])
                    each.not_frontal_chest.update(row["not_frontal_chest"])
                progress.add(row["images"], len(row["errors"]))
                metrics.count_reasons(row["errors"])
    except UserError as mistake:
        raise UserError(f"{mistake}. Scored parts are saved: run the same command again to continue") from mistake
    return scored


def _labeled(part: Part) -> pa.Table:
    """A part's rows with its name, so that both stay together in Ray Data."""
    rows = manifest_rows(part).append_column(PART, pa.array([part.name] * part.rows.num_rows))
    if PART_ROWS not in rows.column_names:
        rows = rows.append_column(PART_ROWS, pa.array([part.rows.num_rows] * part.rows.num_rows))
    return rows


def check_shared(out: str, identity: Identity | None) -> None:
    """Raise UserError if results or the crosswalk lie on a disk that machines of the cluster do not share."""
    cluster.check_shared(out)
    if identity:
        cluster.check_shared(identity.crosswalk)
