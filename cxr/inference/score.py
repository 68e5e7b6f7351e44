"""score(): checkpoints applied to whole archives in one pass, each image exactly once, on Ray Data."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from cxr import schema, storage
from cxr.data import embeddings, gate, ledger, shard_index, shards
from cxr.data.dicom_headers import read_large_archive
from cxr.data.identity import COLUMNS as IDENTITY_COLUMNS
from cxr.data.identity import Identity, open_identity
from cxr.data.run_ledger import SCORES, UNFINISHED, Generation, OpenIncrement, RunLedger, folder_of, read_ledger
from cxr.errors import UserError
from cxr.families import checkpoint, image_crop
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.families.thresholds_file import with_thresholds
from cxr.inference import latents
from cxr.inference.increments import Changes, Listing, compare
from cxr.inference.joined_parts import parts_of
from cxr.inference.options import ScoreOptions, check_archives, resolved
from cxr.inference.panel import Member, Panel, member_record
from cxr.inference.part_scorer import LATENTS, gives_embeddings, gives_latents
from cxr.inference.plan import list_images, part_rows, plan_inputs
from cxr.inference.read import PART_ROWS, SHARD
from cxr.inference.score_increment import score_increment
from cxr.inference.score_job import Job, now
from cxr.inference.scorer import with_tta_flip
from cxr.runtime import audit, lease
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


def score(
    archive: str | Sequence[str],
    panel: str | Panel,
    out: str,
    options: ScoreOptions | None = None,
    *,
    on_start: Callable[[int], object] = lambda images: None,
) -> Scored:
    """Score every image of an archive (raw, or shards), or of several archives, into OUT/scores/*.parquet.

    A rerun into the same OUT continues with the missing parts; every image ends up in exactly one row,
    scored or with `error` set. With `options.new_only`, images that are new or have changed since earlier runs become
    another increment (`data.run_ledger`). Ray is started if it is not running and there is anything to score.

    Args:
        panel: checkpoints that score each image in the same pass, or the URI of a single one.
        on_start: called with the number of images that are left, before the first one, if there is any.

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
    named: list[pa.Table] = []
    with identity.hidden_in_errors(named) if identity else nullcontext(), lease.held(out):
        run = read_ledger(out)
        reading = identity.private(options.reading) if identity else options.reading.with_headers(out)
        options = replace(options, reading=reading)
        panel, models = _loaded(_with_precision(panel, options, run), options)
        settings = _settings(archives, panel, models, options, identity)
        job = Job(archives, panel, models, out, options, settings, deadline, identity, named, on_start)
        run = _with_generation(job, run)
        before = len(run.generations[-1].increments) if options.new_only else 0
        resumes = run.generations[-1].open is not None
        run = run if resumes else _open_increment(job, run)  # nothing is written if it fails
        with _audited(job) as audited:
            run = _score_increments(job, run, resumes)
            members = [_finish(member, job, run) for member in panel.members]
            return _scored(job, run, before, members, audited)


# ---- What is scored, and with what


def _with_precision(panel: Panel, options: ScoreOptions, run: RunLedger) -> Panel:
    """The panel with the precision of each member. "auto" is that of the last generation, whatever machines the
    cluster has now."""
    settings = run.latest.settings if run.latest else {}
    before = settings.get("members", {"": settings})
    members = []
    for member in panel.members:
        precision = member.precision or options.precision
        if precision == "auto":
            precision = before.get(member.name, {}).get("precision", precision)
        if precision == "auto":
            from cxr.runtime import cluster  # imports Ray

            cluster.connect()
            precision = resolved(precision, "cuda" if cluster.total("GPU") else "cpu")
        members.append(replace(member, precision=precision))
    return Panel(tuple(members))


def _loaded(panel: Panel, options: ScoreOptions) -> tuple[Panel, dict[str, Checkpoint]]:
    """The panel with the thresholds that its members use, and its checkpoints."""
    models = {m.name: with_tta_flip(checkpoint.load(m.checkpoint), options.tta_flip) for m in panel.members}
    own = {member.name: member.thresholds_file for member in panel.members if member.thresholds_file}
    models = with_thresholds(models, options.thresholds, own)
    _check_outputs(models, options)
    return Panel(tuple(replace(each, thresholds=models[each.name].thresholds) for each in panel.members)), models


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


def _settings(
    archives: Sequence[str],
    panel: Panel,
    models: Mapping[str, Checkpoint],
    options: ScoreOptions,
    identity: Identity | None,
) -> dict[str, Any]:
    """Everything that scores depend on, as the ledger stores it."""
    of_members = {member.name: _member_settings(member, models[member.name]) for member in panel.members}
    reading = options.reading.describe()
    settings = {
        "archive": archives[0] if len(archives) == 1 else archives,
        **(of_members[""] if panel.is_single else {"panel": panel.names, "members": of_members}),
        "save_images": options.save_images,
        **({"split": options.split} if options.split != "all" else {}),
        **(identity.hidden_settings(reading) if identity else reading),
        **({"save_latents": True} if options.save_latents else {}),
        **({"save_embeddings": True} if options.save_embeddings else {}),
        **({"pseudonyms": identity.key_name} if identity else {}),
    }
    return json.loads(json.dumps(settings))


def _member_settings(member: Member, model: Checkpoint) -> dict[str, Any]:
    """What the scores of a member depend on, besides the options."""
    crop = image_crop.of_checkpoint(model)
    return {
        "checkpoint_sha256": model.about["sha256"],
        "recipe": model.recipe.to_dict(),
        **({"thresholds": dict(model.thresholds)} if model.thresholds else {}),
        "precision": member.precision,
        **({"crop": crop.describe()} if crop else {}),
    }


def _with_generation(job: Job, run: RunLedger) -> RunLedger:
    """The ledger, whose last generation has the job's settings.

    Raises:
        UserError: OUT has scores with other settings, and a run without --new-only cannot begin a generation; or it
            has those of another archive.
    """
    generation = run.latest
    if generation is None:
        return run.with_generation(Generation(job.settings, "first run", now()))
    changes = ledger.changes(generation.settings, job.settings)
    if not changes:
        return run
    reason = "; ".join(changes)
    if not job.options.new_only or generation.settings["archive"] != job.settings["archive"]:
        raise UserError(
            f"{run.uri} contains results with different settings ({reason}): use another --out, or the same settings"
        )
    note(f"all images are scored again, as a new generation, because settings have changed: {reason}")
    return run.with_generation(Generation(job.settings, reason, now()))


# ---- Increments


def _score_increments(job: Job, run: RunLedger, resumes: bool) -> RunLedger:
    """Score and commit the open increment if there is one; if an interrupted run has left it, then also one of what
    is new or has changed since."""
    planned = run.generations[-1].open
    if planned and resumes:
        note(f"continuing with increment {planned.number}, which was started on {planned.opened}")
        if job.identity:
            job.named.append(job.plans(run).images(planned.number))
    if planned:
        run = score_increment(job, run, connected=not resumes)
    if resumes and not run.generations[-1].remaining:
        return _score_increments(job, _open_increment(job, run), resumes=False)
    return run


def _listing(archive: str, job: Job) -> Listing:
    is_raw = not shards.is_shards(archive)
    if job.options.new_only and not is_raw:
        raise UserError(
            f"expected the original archive with --new-only, got the shards {archive}: use the archive from which "
            f"they were made, or omit --new-only"
        )
    with recorded_listings():
        if is_raw:
            read_large_archive(archive, job.options.reading)
        listing = list_images(archive, job.options.reading, job.options.split)
    files = [] if is_raw else listing.rows[SHARD].unique().to_pylist()
    ids = [storage.read_parquet(file, columns=IDENTITY_COLUMNS) for file in files] if job.identity else []
    job.show_notes(listing.notes, [listing.rows] if is_raw else ids)
    return listing


def _open_increment(job: Job, run: RunLedger) -> RunLedger:
    """Plan what has changed since the last increment; the ledger has an open increment if there is anything."""
    generation, plans, number = run.generations[-1], job.plans(run), run.next_number
    listings = [_listing(uri, job) for uri in job.archives]
    _check_ids(listings)
    changes = compare(listings, plans.known(generation, retry=job.options.new_only))
    if job.options.new_only:
        counts = {
            "new": changes.new,
            "changed": changes.changed,
            "unchanged": changes.unchanged,
            "removed": changes.removed.num_rows,
            "moved": changes.moved.num_rows,
        }
        print(f"archive: {', '.join(f'{count:,} {name}' for name, count in counts.items())} images", flush=True)
    else:
        _check_unchanged(run, changes)
        counts = {"new": sum(_count(rows) for rows in changes.to_score), "changed": 0}
    if not changes.any:
        return run
    to_score = []
    for listing, rows in zip(listings, changes.to_score, strict=True):
        plan = plan_inputs(listing.origin, job.models)
        if plan.encoded and job.options.save_latents:
            raise UserError(f"{listing.origin.archive} already contains latents: omit --save-latents")
        to_score.append((listing.origin, rows, part_rows(plan, rows)))
    if any(map(_count, changes.to_score)):
        job.connect()
    if number:
        storage.delete(storage.join(job.out, folder_of(number)))  # left by a run that was killed at this point
    storage.delete(storage.join(job.out, UNFINISHED))
    plans.write(number, to_score)
    plans.write_departures(number, changes)
    run = run.with_latest(open=OpenIncrement(number, opened=now(), **counts))
    run.write()
    return run


def _check_unchanged(run: RunLedger, changes: Changes) -> None:
    """Raise UserError if the archive has changed since a run without --new-only began to score it."""
    generation = run.generations[-1]
    left = sum(_count(rows) for rows in changes.to_score)
    if generation.increments and (changes.changed or changes.removed.num_rows or left != generation.remaining):
        raise UserError(
            f"{run.uri} contains scores of an earlier state of the archive ({changes.new:,} images are new, "
            f"{changes.changed:,} have changed, {changes.removed.num_rows:,} have been removed): choose another "
            f"--out, or use --new-only to score only what is new or has changed"
        )


def _count(rows: pa.Table) -> int:
    """The number of images in rows of a listing, which may be parts of shards."""
    return sum(rows[PART_ROWS].to_pylist()) if PART_ROWS in rows.column_names else rows.num_rows


def _check_ids(listings: Sequence[Listing]) -> None:
    """Raise UserError if several archives share an image id, by which scores are identified."""
    if len(listings) > 1:
        ids = itertools.chain.from_iterable(_image_ids(listing) for listing in listings)
        shard_index.check_unique(ids, " and ".join(listing.origin.archive for listing in listings))


def _image_ids(listing: Listing) -> Iterable[pa.ChunkedArray]:
    """Ids of all images of a listing, including those that ingest rejected."""
    if SHARD in listing.rows.column_names:
        return shard_index.image_ids(shards.read_info(listing.origin.archive, latents=True))
    return [listing.rows[schema.IMAGE_ID]]


# ---- Results


@contextmanager
def _audited(job: Job) -> Iterator[dict[str, Any]]:
    """Record the block in the audit log: what it scores, and how far it gets."""
    options = asdict(job.options)
    about = {
        "job": "score",
        "archives": job.archives,
        "options": job.identity.hidden_settings(options) if job.identity else options,
        "members": [
            {"name": name, "checkpoint": model.uri, "sha256": model.about["sha256"]}
            for name, model in job.models.items()
        ],
    }
    with audit.recorded(job.out, about, errors=job.identity is None) as audited:
        audited["files"] = job.files
        yield audited


def _finish(member: Member, job: Job, run: RunLedger) -> ScoredMember:
    """Finish the latents and embeddings of a member, unless images are left for another run."""
    model, generation, plans = job.models[member.name], run.generations[-1], job.plans(run)
    saves_latents = job.options.save_latents and gives_latents(model.recipe) and not generation.remaining
    saves_embeddings = job.options.save_embeddings and gives_embeddings(model.recipe) and not generation.remaining
    latents_uri = storage.join(member.folder(job.out), LATENTS) if saves_latents else ""
    embeddings_uri = storage.join(member.folder(job.out), embeddings.FOLDER) if saves_embeddings else ""
    if latents_uri:
        (origin,) = {plan.origin for each in generation.increments for plan in plans.read(each.number)}
        latents.finish(latents_uri, parts_of(job.out, generation, plans, schema.REJECTS.names), model, origin)
    if embeddings_uri:
        parts = [name for name, _ in parts_of(job.out, generation, plans, [schema.IMAGE_ID])]
        network = {"checkpoint": model.uri, "sha256": model.about["sha256"], "archives": job.archives}
        embeddings.finish(embeddings_uri, parts, network)
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


def _scored(job: Job, run: RunLedger, before: int, members: list[ScoredMember], audited: dict[str, Any]) -> Scored:
    """The result of the increments after the first `before`, which have been committed.

    Raises:
        UserError: too many of their images are unusable.
    """
    increments = run.generations[-1].increments[before:]
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
        remaining=increments[-1].remaining if increments else 0,
    )
    audited |= {"images": scored.images, "rejects": scored.rejects, "reasons": dict(reasons)}
    excluded = sum(count for reason, count in reasons.items() if gate.is_excluded(reason))
    if not job.options.new_only or scored.rejects - excluded >= _FEWEST_REJECTS:
        _check_rejects(scored, excluded, job.options.max_rejects)
    return scored


def _check_rejects(scored: Scored, excluded: int, most: float) -> None:
    unusable = scored.rejects - excluded
    share = unusable / max(1, scored.images)
    if share > most:
        top = "; ".join(f"{reason} ({count})" for reason, count in list(scored.reasons.items())[:3])
        raise UserError(
            f"{unusable} of {scored.images} images ({share:.0%}) could not be read, more than --max-rejects "
            f"{most:g} allows: {top}. All other images have been scored in {scored.scores}"
        )
