"""score(): checkpoints applied to whole archives in one pass, each image exactly once, on Ray Data."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from cxr import schema, storage
from cxr.data import embeddings, gate, ledger, shards
from cxr.data.dicom_headers import read_large_archive
from cxr.data.identity import COLUMNS as IDENTITY_COLUMNS
from cxr.data.identity import open_identity
from cxr.data.run_ledger import (
    SCORES,
    Generation,
    Increment,
    OpenIncrement,
    RunLedger,
    folder_of,
    read_ledger,
)
from cxr.errors import UserError
from cxr.families import checkpoint, lung_crop
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.families.thresholds_file import with_thresholds
from cxr.inference import latents
from cxr.inference.increments import Listing, StoredPlan, compare, divide
from cxr.inference.options import ScoreOptions, check_archives, resolved
from cxr.inference.panel import Member, Panel, member_record
from cxr.inference.part_scorer import LATENTS, gives_embeddings, gives_latents
from cxr.inference.plan import Plan, list_raw, part_rows, plan_scoring, raw_plan
from cxr.inference.read import SHARD
from cxr.inference.score_increment import (
    Job,
    check_shared,
    count_images,
    is_shard,
    now,
    score_increment,
    written_parts,
)
from cxr.inference.scorer import with_tta_flip
from cxr.runtime import audit, cluster, lease
from cxr.runtime.console import note
from cxr.runtime.deadline import parse_deadline
from cxr.sources.image_files import recorded_listings

_FEWEST_REJECTS = 10  # unusable images for which a run with --new-only fails: a night may have few images


@dataclass(frozen=True)
class Scored:
    """The result of a scoring run."""

    scores: str  # folder of Parquet files, schema.SCORES and the columns of the families
    images: int
    rejects: int
    reasons: dict[str, int]  # the most frequent errors, with counts
    not_frontal_chest: dict[str, int]  # known properties of other images ("view LATERAL"), with counts
    images_per_s: float
    members: list[ScoredMember] = field(default_factory=list)
    increments: list[dict[str, Any]] = field(default_factory=list)  # see data.run_ledger.Increment
    remaining: int = 0  # images that were left for the next run because of a deadline


@dataclass(frozen=True)
class ScoredMember:
    """A checkpoint of a scoring run, and what it wrote besides scores."""

    name: str  # empty for a single checkpoint
    family: str
    checkpoint: str
    sha256: str
    latents: str  # archive of latents; empty if there is none
    embeddings: str  # folder of Parquet files, see data.embeddings; empty if there are none
    thresholds: dict[str, float]  # decision thresholds that replaced the checkpoint's own


def score(archive: str | Sequence[str], panel: str | Panel, out: str, options: ScoreOptions | None = None) -> Scored:
    """Score every image of an archive (raw, or shards), or of several archives, into OUT/scores/*.parquet.

    A rerun into the same OUT continues with the missing parts; every image ends up in exactly one row,
    scored or with `error` set. With `options.new_only`, images that are new or have changed since earlier runs become
    another increment (`data.run_ledger`). Ray must be running, except with `new_only`, which starts it if there is
    anything to score.

    Args:
        panel: checkpoints that score each image in the same pass, or the URI of a single one.

    Raises:
        UserError: OUT has scores of other archives or other checkpoints, several archives share an image id, or
            more than `max_rejects` are unreadable.
    """
    options = options or ScoreOptions()
    panel = Panel.of([panel]) if isinstance(panel, str) else panel
    archives = check_archives([archive] if isinstance(archive, str) else archive, options)
    out = storage.normalize(out)
    deadline = parse_deadline(options.until, time.time()) if options.until else None
    identity = open_identity(options.pseudonymize, options.crosswalk, out, archives)
    if not options.new_only:
        check_shared(out, identity)
    named: list[pa.Table] = []
    with identity.hidden_in_errors(named) if identity else nullcontext(), lease.held(out):
        run = read_ledger(out)
        reading = identity.private(options.reading) if identity else options.reading.with_headers(out)
        options = replace(options, reading=reading)
        panel = _with_precision(panel, options, run)
        models = {m.name: with_tta_flip(checkpoint.load(m.checkpoint), options.tta_flip) for m in panel.members}
        models = with_thresholds(models, options.thresholds)
        for member in panel.members:
            if member.thresholds_file:
                models |= with_thresholds({member.name: models[member.name]}, [member.thresholds_file])
        panel = Panel(tuple(replace(member, thresholds=models[member.name].thresholds) for member in panel.members))
        _check_outputs(models, options)
        of_members = {member.name: _member_settings(member, models[member.name]) for member in panel.members}
        settings = {
            "archive": archives[0] if len(archives) == 1 else archives,
            **(of_members[""] if panel.is_single else {"panel": panel.names, "members": of_members}),
            "save_images": options.save_images,
            **options.reading.describe(),
            **({"save_latents": True} if options.save_latents else {}),
            **({"save_embeddings": True} if options.save_embeddings else {}),
            **({"pseudonyms": identity.key_name} if identity else {}),
        }
        settings = json.loads(json.dumps(settings))
        job = Job(archives, panel, models, out, options, settings, deadline, identity, named)
        return _score_new(job, run) if options.new_only else _score_all(job, run)


def _with_precision(panel: Panel, options: ScoreOptions, run: RunLedger) -> Panel:
    """The panel with the precision of each member. With --new-only, "auto" is that of the last generation, whatever
    machines the cluster has now."""
    settings = run.latest.settings if options.new_only and run.latest else {}
    before = settings.get("members", {"": settings})
    members = []
    for member in panel.members:
        precision = member.precision or options.precision
        if precision == "auto":
            precision = before.get(member.name, {}).get("precision", precision)
        if precision == "auto":
            cluster.connect()
            precision = resolved(precision, "cuda" if cluster.total("GPU") else "cpu")
        members.append(replace(member, precision=precision))
    return Panel(tuple(members))


@contextmanager
def _audited(job: Job) -> Iterator[dict[str, Any]]:
    """Record the block in the audit log: what it scores, and how far it gets."""
    about = {
        "job": "score",
        "archives": job.archives,
        "options": asdict(job.options),
        "members": [
            {"name": name, "checkpoint": model.uri, "sha256": model.about["sha256"]}
            for name, model in job.models.items()
        ],
    }
    with audit.recorded(job.out, about, errors=job.identity is None) as audited:
        audited |= {"reasons": job.total.reasons, "files": job.total.files}
        yield audited


def _scored(
    job: Job, increments: Sequence[Increment], members: list[ScoredMember], audited: dict[str, Any]
) -> Scored:
    """The result of increments that have been committed.

    Raises:
        UserError: too many of their images are unusable.
    """
    reasons, not_frontal_chest = Counter[str](), Counter[str]()
    for increment in increments:
        reasons.update(increment.reasons)
        not_frontal_chest.update(increment.not_frontal_chest)
    scored = Scored(
        scores=storage.join(job.out, SCORES),
        images=sum(increment.images for increment in increments),
        rejects=sum(increment.rejects for increment in increments),
        reasons=dict(reasons.most_common(20)),
        not_frontal_chest=dict(not_frontal_chest.most_common()),
        images_per_s=increments[-1].images_per_s if increments else 0.0,
        members=members,
        increments=[asdict(increment) for increment in increments],
        remaining=sum(increment.remaining for increment in increments),
    )
    audited |= {"images": scored.images, "rejects": scored.rejects}
    excluded = sum(count for reason, count in reasons.items() if gate.is_excluded(reason))
    if not job.options.new_only or scored.rejects - excluded >= _FEWEST_REJECTS:
        _check_rejects(scored, excluded, job.options.max_rejects)
    return scored


# ---- Whole archives


def _score_all(job: Job, run: RunLedger) -> Scored:
    """Score all images into increment 0, or those that an interrupted run has left."""
    plans = _numbered([_plan(uri, job) for uri in job.archives])
    _check_ids(plans)
    with _audited(job) as audited:
        increment = _score_plans(job, run, plans)
        written = {part.name: storage.join(job.out, part.path) for plan in plans for part in plan.parts}
        uris = {} if increment.remaining else written
        members = [_finish(member, job, plans, uris) for member in job.panel.members]
        return _scored(job, [increment], members, audited)


def _score_plans(job: Job, run: RunLedger, plans: Sequence[Plan]) -> Increment:
    """Score the missing parts of increment 0, and commit it."""
    parts = [part for plan in plans for part in plan.parts]
    fingerprint = job.fingerprint(parts)
    generation = run.latest
    if generation is None:
        generation = Generation(job.settings, "first run", now(), fingerprint)
        run = run.with_generation(generation)
    else:
        _check_continues(run, generation, job.settings, fingerprint)
    before = generation.increments[0] if generation.increments else None
    written = written_parts(job.out, 0)
    missing = {part.name for part in parts} - written
    if before and not missing and (before.parts, before.remaining) == (len(parts), 0):
        job.total.reasons.update(before.reasons)
        return before
    raw = [plan for plan in plans if not any(map(is_shard, plan.parts))]
    job.plans.write(0, [StoredPlan(plan.origin, plan.parts) for plan in raw], scored=written)
    planned = OpenIncrement(0, new=count_images(parts), changed=0, opened=now())
    run = run.with_latest(fingerprint=fingerprint, increments=(), open=planned)
    run.write()
    return score_increment(job, run, plans)


def _check_continues(run: RunLedger, generation: Generation, settings: Mapping[str, Any], fingerprint: str) -> None:
    """Raise UserError unless a run without --new-only continues the run that OUT has."""
    asked = {"settings": settings, "fingerprint": fingerprint}
    ledger.check_same(run.uri, asked | {"settings": generation.settings}, asked)
    if run.next_number > 1:
        raise UserError(
            f"{run.uri} contains {run.next_number} increments: give --new-only to add what is new, or choose another "
            f"--out"
        )
    advice = ", or give --new-only to score only what is new or has changed"
    ledger.check_same(run.uri, asked | {"fingerprint": generation.fingerprint or fingerprint}, asked, advice)


# ---- Increments


def _score_new(job: Job, run: RunLedger) -> Scored:
    """Finish an open increment, then score what is new or has changed since."""
    if of_shards := next((uri for uri in job.archives if shards.is_shards(uri)), None):
        raise UserError(
            f"expected the original archive with --new-only, got the shards {of_shards}: give the archive from which "
            f"they were made, or omit --new-only"
        )
    generation = run.latest
    if generation and generation.settings["archive"] != job.settings["archive"]:
        ledger.check_same(run.uri, _archive_only(generation.settings), _archive_only(job.settings))
    changes = ledger.changes(generation.settings, job.settings) if generation else ["first run"]
    if changes:
        reason = "; ".join(changes)
        if generation:
            note(f"a new generation begins, which scores all images again: {reason}")
        run = run.with_generation(Generation(job.settings, reason, now()))
    with _audited(job) as audited:
        increments = list(_score_increments(job, run))
        members = [_finish(member, job, [], {}) for member in job.panel.members]
        return _scored(job, increments, members, audited)


def _score_increments(job: Job, run: RunLedger) -> Iterator[Increment]:
    """Score and commit the increment that an interrupted run has left, and one of what is new or has changed."""
    if planned := run.generations[-1].open:
        note(f"continuing with increment {planned.number}, begun {planned.opened}")
        plans = [raw_plan(plan.origin, job.models, plan.parts) for plan in job.plans.read(planned.number)]
        job.show_notes((), (part.rows for plan in plans for part in plan.parts))
        increment = score_increment(job, run, plans)
        yield increment
        if increment.remaining:
            return
        run = read_ledger(job.out)
    run, plans = _open_increment(job, run, [_listing(uri, job) for uri in job.archives])
    if run.generations[-1].open:
        yield score_increment(job, run, plans)


def _archive_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"settings": {"archive": settings["archive"]}, "fingerprint": ""}


def _listing(archive: str, job: Job) -> Listing:
    with recorded_listings():
        read_large_archive(archive, job.options.reading)
        listing, notes = list_raw(archive, job.options.reading)
    job.show_notes(notes, [listing.rows])
    return listing


def _open_increment(job: Job, run: RunLedger, listings: Sequence[Listing]) -> tuple[RunLedger, list[Plan]]:
    """Plan what has changed since the last increment; the ledger has an open increment if there is anything."""
    generation = run.generations[-1]
    if len(listings) > 1:
        ids = itertools.chain.from_iterable(each.rows[schema.IMAGE_ID].to_pylist() for each in listings)
        shards.check_unique(ids, " and ".join(each.origin.archive for each in listings))
    changes = compare(listings, job.plans.known(generation))
    counts = {
        "new": changes.new,
        "changed": changes.changed,
        "unchanged": changes.unchanged,
        "removed": changes.removed.num_rows,
        "moved": changes.moved.num_rows,
    }
    print(f"archive: {', '.join(f'{count:,} {name}' for name, count in counts.items())} images", flush=True)
    if not changes.any:
        return run, []
    number, plans = run.next_number, list[Plan]()
    for listing, rows in zip(listings, changes.to_score, strict=True):
        plan = raw_plan(listing.origin, job.models)
        first = sum(len(each.parts) for each in plans)
        plans.append(replace(plan, parts=divide(rows, number, part_rows(plan.formats, rows.num_rows), first)))
    parts = [part for plan in plans for part in plan.parts]
    if number:
        storage.delete(storage.join(job.out, folder_of(number)))  # left by a run that was killed at this point
    job.plans.write(number, [StoredPlan(plan.origin, plan.parts) for plan in plans])
    job.plans.write_departures(number, changes)
    if not generation.increments:
        fingerprint = job.fingerprint(parts)
        run = run.with_latest(fingerprint=fingerprint)
    run = run.with_latest(open=OpenIncrement(number, opened=now(), **counts))
    run.write()
    return run, plans


# ---- Plans and results


def _check_outputs(models: Mapping[str, Checkpoint], options: ScoreOptions) -> None:
    """Raise UserError if no checkpoint has the latents, embeddings or mirror images that the options request."""
    recipes = [model.recipe for model in models.values()]
    if options.tta_flip != "checkpoint" and all(recipe.with_tta_flip(True) is None for recipe in recipes):
        raise UserError(
            f"--tta-flip {options.tta_flip}: expected a checkpoint of family classify, lungs or pneumothorax, got "
            f"{', '.join(recipe.family for recipe in recipes)}: omit it"
        )
    if options.save_latents and not any(map(gives_latents, recipes)):
        latent_encoder(recipes[0]).latent_format()  # raises UserError
    if options.save_embeddings and not any(map(gives_embeddings, recipes)):
        embedder(recipes[0])  # raises UserError


def _plan(archive: str, job: Job) -> Plan:
    with recorded_listings():
        if not shards.is_shards(archive):
            read_large_archive(archive, job.options.reading)
        plan = plan_scoring(archive, job.models, job.options.reading)
    job.show_notes(plan.notes, _identified(plan) if job.identity else [])
    if plan.encoded and job.options.save_latents:
        raise UserError(f"{archive} already contains latents: omit --save-latents")
    return plan


def _identified(plan: Plan) -> list[pa.Table]:
    """The ids and paths of all images of a plan."""
    parts = [part.rows for part in plan.parts]
    if plan.parts and is_shard(plan.parts[0]):
        files = dict.fromkeys(rows[SHARD][0].as_py() for rows in parts)
        parts = [storage.read_parquet(uri, columns=IDENTITY_COLUMNS) for uri in files]
    return parts


def _member_settings(member: Member, model: Checkpoint) -> dict[str, Any]:
    """What the scores of a member depend on, besides the options."""
    crop = lung_crop.of_checkpoint(model)
    return {
        "checkpoint_sha256": model.about["sha256"],
        "recipe": model.recipe.to_dict(),
        **({"thresholds": dict(model.thresholds)} if model.thresholds else {}),
        "precision": member.precision,
        **({"lung_crop": crop.describe()} if crop else {}),
    }


def _finish(member: Member, job: Job, plans: Sequence[Plan], uris: Mapping[str, str]) -> ScoredMember:
    """Finish the latents and embeddings of a member after all parts have been written.

    Args:
        uris: of the scores of each part, by the part's name; empty if parts are left for another run.
    """
    model = job.models[member.name]
    saves_latents = uris and job.options.save_latents and gives_latents(model.recipe)
    saves_embeddings = uris and job.options.save_embeddings and gives_embeddings(model.recipe)
    latents_uri = storage.join(member.folder(job.out), LATENTS) if saves_latents else ""
    embeddings_uri = storage.join(member.folder(job.out), embeddings.FOLDER) if saves_embeddings else ""
    if latents_uri:
        latents.finish(latents_uri, uris, model, plans[0].origin)
    if embeddings_uri:
        network = {"checkpoint": model.uri, "sha256": model.about["sha256"]}
        embeddings.finish(embeddings_uri, uris, network | {"archives": [plan.origin.archive for plan in plans]})
    about = member_record(member.name, model)
    return ScoredMember(
        name=member.name,
        family=about["family"],
        checkpoint=model.uri,
        sha256=about["sha256"],
        latents=latents_uri,
        embeddings=embeddings_uri,
        thresholds=dict(model.thresholds),
    )


def _numbered(plans: Sequence[Plan]) -> list[Plan]:
    """The same plans with their parts numbered consecutively, so that part names are unique across archives."""
    numbers = itertools.count()
    return [
        replace(plan, parts=[replace(part, name=f"{SCORES}/part-{next(numbers):05d}") for part in plan.parts])
        for plan in plans
    ]


def _check_ids(plans: Sequence[Plan]) -> None:
    """Raise UserError if several archives share an image id, by which scores are identified."""
    if len(plans) > 1:
        ids = itertools.chain.from_iterable(_image_ids(plan) for plan in plans)
        shards.check_unique(ids, " and ".join(plan.origin.archive for plan in plans))


def _image_ids(plan: Plan) -> Iterable[str]:
    """Ids of all images of a plan, including those that ingest rejected."""
    uris = [*dict.fromkeys(part.rows[SHARD][0].as_py() for part in plan.parts if is_shard(part))]
    listed = (part.rows[schema.IMAGE_ID].to_pylist() for part in plan.parts if not is_shard(part))
    return itertools.chain(shards.image_ids(uris), *listed)


def _check_rejects(scored: Scored, excluded: int, most: float) -> None:
    unusable = scored.rejects - excluded
    share = unusable / max(1, scored.images)
    if share > most:
        top = "; ".join(f"{reason} ({count})" for reason, count in list(scored.reasons.items())[:3])
        raise UserError(
            f"{unusable} of {scored.images} images ({share:.0%}) could not be read, more than --max-rejects "
            f"{most:g} allows: {top}. All other images have been scored in {scored.scores}"
        )
