"""Score the planned parts of an increment, each exactly once, and commit it to the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cxr import storage
from cxr.data.ledger import SUFFIX
from cxr.data.run_ledger import UNFINISHED, Increment, RunLedger
from cxr.inference.joined_parts import join_parts
from cxr.inference.plan_store import Left, PlannedPart
from cxr.inference.score_job import Job, now
from cxr.runtime import provenance
from cxr.runtime.console import say
from cxr.runtime.progress import Progress

_REASONS = 1000  # different errors that the ledger lists


def score_increment(job: Job, run: RunLedger, *, connected: bool) -> RunLedger:
    """Score the missing parts of the open increment, and commit it; returns the ledger with it.

    Args:
        connected: the cluster has been joined, as it is before anything is planned on it.
    """
    generation = run.generations[-1]
    planned = generation.open
    assert planned
    plans = job.plans(run).read(planned.number)
    parts = [part for plan in plans for part in plan.parts]
    done = _written(job.out, parts)
    progress = Progress("scored", _images(parts), done=_images(part for part in parts if part.name in done))
    if len(done) < len(parts):
        from cxr.inference.score_parts import score_parts  # imports Ray

        if not connected:
            job.connect()
        job.on_start(progress.total - progress.done)
        for plan in plans:
            score_parts([part for part in plan.parts if part.name not in done], job, plan, planned.number, progress)
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


def _written(out: str, parts: Sequence[PlannedPart]) -> set[str]:
    """Names of these parts that have been written."""
    try:
        files = {f"{UNFINISHED}/{file.path}" for file in storage.list_files(storage.join(out, UNFINISHED))}
    except storage.NotFoundError:
        return set()
    return {part.name for part in parts if part.name + SUFFIX in files}


def _images(parts: Iterable[PlannedPart]) -> int:
    return sum(part.images for part in parts)
