"""score(): checkpoints applied to whole archives in one pass, each image exactly once, on Ray Data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray.data

from cxr import schema, storage
from cxr.data import embeddings, gate, ledger, shards
from cxr.data.dicom_headers import read_large_archive
from cxr.data.identity import COLUMNS as IDENTITY_COLUMNS
from cxr.data.identity import Identity, open_identity
from cxr.data.ledger import Ledger, Part
from cxr.data.ray_data import finished, map_blocks
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.families.thresholds_file import with_thresholds
from cxr.inference import latents
from cxr.inference.options import Precision, ScoreOptions, check_archives, resolved
from cxr.inference.panel import Member, Panel, member_record
from cxr.inference.part_scorer import COUNTED, LATENTS, PartScorer, ScoreCounts, gives_embeddings, gives_latents
from cxr.inference.plan import SCORES, Plan, plan_scoring
from cxr.inference.read import PART, PART_ROWS, SHARD, InputFormat
from cxr.inference.scorer import with_tta_flip
from cxr.runtime import audit, cluster, lease
from cxr.runtime.progress import Progress

_PARTS_AT_ONCE = 3  # of a replica: one in the network, one becoming scores, one being written


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
    scored or with `error` set.

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
    cluster.check_shared(out)
    identity = open_identity(options.pseudonymize, options.crosswalk, out, archives)
    if identity is None:
        return _score(archives, panel, out, options)
    cluster.check_shared(identity.crosswalk)
    named: list[pa.Table] = []
    with identity.hidden_in_errors(named):
        return _score(archives, panel, out, options, identity, named)


def _score(
    archives: list[str],
    panel: Panel,
    out: str,
    options: ScoreOptions,
    identity: Identity | None = None,
    named: list[pa.Table] | None = None,
) -> Scored:
    """See `score`.

    Args:
        identity: replaces ids and paths; None keeps them.
        named: gets the ids and paths of the images as soon as they are known.
    """
    reading = identity.private(options.reading) if identity else options.reading.with_headers(out)
    options = replace(options, reading=reading)
    panel = _with_precision(panel, options.precision)
    models = {m.name: with_tta_flip(checkpoint.load(m.checkpoint), options.tta_flip) for m in panel.members}
    models = with_thresholds(models, options.thresholds)
    for member in panel.members:
        if member.thresholds_file:
            models |= with_thresholds({member.name: models[member.name]}, [member.thresholds_file])
    panel = Panel(tuple(replace(member, thresholds=models[member.name].thresholds) for member in panel.members))
    _check_outputs(models, options)
    plans = _numbered([_plan(uri, models, options, identity, named) for uri in archives])
    _check_ids(plans)
    parts = [part for plan in plans for part in plan.parts]
    of_members = {
        member.name: _member_settings(member, models[member.name], plans[0].formats[number])
        for member, number in zip(panel.members, plans[0].format_of, strict=True)
    }
    settings = {
        "archive": archives[0] if len(archives) == 1 else archives,
        **(of_members[""] if panel.is_single else {"panel": panel.names, "members": of_members}),
        "save_images": options.save_images,
        **options.reading.describe(),
        **({"save_latents": True} if options.save_latents else {}),
        **({"save_embeddings": True} if options.save_embeddings else {}),
        **({"pseudonyms": identity.key_name} if identity else {}),
    }
    about = {
        "job": "score",
        "archives": archives,
        "options": asdict(options),
        "members": [
            {"name": name, "checkpoint": model.uri, "sha256": model.about["sha256"]} for name, model in models.items()
        ],
    }
    with lease.held(out), audit.recorded(out, about, errors=identity is None) as audited:
        run_ledger = ledger.open_ledger(out, settings, parts)
        todo = run_ledger.todo(parts)
        progress = Progress("scored", _images(parts), done=_images(parts) - _images(todo))
        missing = {part.name for part in todo}
        counts = ScoreCounts()
        audited |= {"reasons": counts.reasons, "files": counts.files}  # as far as the run gets
        for plan in plans:
            remaining = [part for part in plan.parts if part.name in missing]
            _score_parts(remaining, run_ledger, panel, plan, options, identity, progress, counts)
        for part in parts:
            if part.name not in missing:  # an earlier run has written it
                counts.add(storage.read_parquet(run_ledger.file(part), columns=COUNTED.names))
        uris = {part.name: run_ledger.file(part) for part in parts}
        members = [_finish(member, models[member.name], plans, uris, out, options) for member in panel.members]
        progress.show()
        scored = Scored(
            scores=storage.join(out, SCORES),
            images=progress.total,
            rejects=counts.reasons.total(),
            reasons=dict(counts.reasons.most_common(20)),
            not_frontal_chest=dict(counts.not_frontal_chest.most_common()),
            images_per_s=round(progress.images_per_second, 1),
            members=members,
        )
        audited |= {"images": scored.images, "rejects": scored.rejects}
        excluded = sum(count for reason, count in counts.reasons.items() if gate.is_excluded(reason))
        _check_rejects(scored, excluded, options.max_rejects)
        return scored


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


def _plan(
    archive: str,
    models: Mapping[str, Checkpoint],
    options: ScoreOptions,
    identity: Identity | None,
    named: list[pa.Table] | None,
) -> Plan:
    if not shards.is_shards(archive):
        read_large_archive(archive, options.reading)
    plan = plan_scoring(archive, models, options.reading)
    rows = _identified(plan) if identity else []
    if named is not None:
        named += rows
    for line in plan.notes:
        print(f"note: {identity.hide(line, rows) if identity else line}", flush=True)
    if plan.encoded and options.save_latents:
        raise UserError(f"{archive} already contains latents: omit --save-latents")
    return plan


def _identified(plan: Plan) -> list[pa.Table]:
    """The ids and paths of all images of a plan."""
    parts = [part.rows for part in plan.parts]
    if plan.parts and SHARD in parts[0].column_names:
        parts = [storage.read_parquet(rows[SHARD][0].as_py(), columns=IDENTITY_COLUMNS) for rows in parts]
    return parts


def _with_precision(panel: Panel, default: Precision) -> Panel:
    """The panel with the precision of each member on the machines of this cluster."""
    device = "cuda" if cluster.total("GPU") else "cpu"
    return Panel(tuple(replace(m, precision=resolved(m.precision or default, device)) for m in panel.members))


def _member_settings(member: Member, model: Checkpoint, images: InputFormat) -> dict[str, Any]:
    """What the scores of a member depend on, besides the options."""
    return {
        "checkpoint_sha256": model.about["sha256"],
        "recipe": model.recipe.to_dict(),
        **({"thresholds": dict(model.thresholds)} if model.thresholds else {}),
        "precision": member.precision,
        **({"lung_crop": images.crop.describe()} if images.crop else {}),
    }


def _finish(
    member: Member,
    model: Checkpoint,
    plans: Sequence[Plan],
    uris: Mapping[str, str],
    out: str,
    options: ScoreOptions,
) -> ScoredMember:
    """Finish the latents and embeddings of a member after all parts have been written.

    Args:
        uris: of the scores of each part, by the part's name.
    """
    saves_latents = options.save_latents and gives_latents(model.recipe)
    saves_embeddings = options.save_embeddings and gives_embeddings(model.recipe)
    latents_uri = storage.join(member.folder(out), LATENTS) if saves_latents else ""
    embeddings_uri = storage.join(member.folder(out), embeddings.FOLDER) if saves_embeddings else ""
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
    uris = [part.rows[SHARD][0].as_py() for part in plan.parts if SHARD in part.rows.column_names]
    listed = (part.rows[schema.IMAGE_ID].to_pylist() for part in plan.parts if SHARD not in part.rows.column_names)
    return itertools.chain(shards.image_ids(uris), *listed)


def _images(parts: list[Part]) -> int:
    return sum(
        part.rows[PART_ROWS][0].as_py() if SHARD in part.rows.column_names else part.rows.num_rows for part in parts
    )


def _score_parts(
    todo: list[Part],
    run_ledger: Ledger,
    panel: Panel,
    plan: Plan,
    options: ScoreOptions,
    identity: Identity | None,
    progress: Progress,
    counts: ScoreCounts,
) -> None:
    """Read parts on CPUs, score and write them on GPUs if there are any; only counts return, into `counts`.

    Each replica has a few parts at a time, so that its network never waits for what is made of predictions, and no
    more than these, so that reading waits for it. Networks on CPUs use all of them between parts that are read.
    """
    if not todo:
        return
    gpus = int(cluster.total("GPU"))
    share = min(1.0, cluster.total("CPU") / 2)  # CPUs per task: reading and scoring must both fit into the cluster
    workers = options.workers or gpus or max(1, int(cluster.total("CPU")) // 2)
    parts, plan = [_labeled(part) for part in todo], replace(plan, parts=[])
    read = replace(plan.reader(options.reading.gate), identity=identity)
    tables = map_blocks(ray.data.from_arrow(parts), read.labeled_rows, num_cpus=share)
    scored = map_blocks(
        tables,
        PartScorer,
        pool=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=_PARTS_AT_ONCE,
            max_tasks_in_flight_per_actor=_PARTS_AT_ONCE + 1,
        ),
        fn_constructor_args=(panel, run_ledger, plan, options, max(1, int(cluster.total("CPU")) // workers)),
        num_cpus=share,
        num_gpus=1 if gpus else None,
    )
    try:
        for row in finished(scored, [part.name for part in todo]):
            counts.files[f"{row['name']}{ledger.SUFFIX}"] = row["sha256"]
            counts.reasons.update(row["errors"])
            counts.not_frontal_chest.update(row["not_frontal_chest"])
            progress.add(row["images"], len(row["errors"]))
    except UserError as mistake:
        raise UserError(f"{mistake}. Scored parts are saved: run the same command again to continue") from mistake


def _labeled(part: Part) -> pa.Table:
    """A part's rows with its name, so that both stay together in Ray Data."""
    rows = part.rows.append_column(PART, pa.array([part.name] * part.rows.num_rows))
    if PART_ROWS not in rows.column_names:
        rows = rows.append_column(PART_ROWS, pa.array([part.rows.num_rows] * part.rows.num_rows))
    return rows


def _check_rejects(scored: Scored, excluded: int, most: float) -> None:
    unusable = scored.rejects - excluded
    share = unusable / max(1, scored.images)
    if share > most:
        top = "; ".join(f"{reason} ({count})" for reason, count in list(scored.reasons.items())[:3])
        raise UserError(
            f"{unusable} of {scored.images} images ({share:.0%}) could not be read, more than --max-rejects "
            f"{most:g} allows: {top}. All other images have been scored in {scored.scores}"
        )
