"""score(): a checkpoint applied to a whole archive, each image exactly once, on Ray Data."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from cxr import schema, storage
from cxr.data import embeddings, gate, ledger, shards
from cxr.data.batch import best_device
from cxr.data.dicom_headers import read_large_archive
from cxr.data.ledger import Ledger, Part
from cxr.data.ray_data import finished, map_blocks
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.imaging import dicom_terms
from cxr.inference import latents
from cxr.inference.options import ScoreOptions, check_archives, resolved
from cxr.inference.plan import SCORES, Plan, plan_scoring
from cxr.inference.read import PART, PART_ROWS, SHARD
from cxr.inference.scorer import ScoredBatch, Scorer
from cxr.runtime import cluster, lease
from cxr.runtime.console import note
from cxr.runtime.progress import Progress

LATENTS = "latents"  # folder of the result, beside SCORES
_CODES = (schema.VIEW, schema.BODY_PART, schema.MODALITY)
_COUNTED = pa.schema([schema.SCORES.field(n) for n in (schema.ERROR, schema.GATE, *_CODES)])


@dataclass(frozen=True)
class Scored:
    """The result of a scoring run."""

    scores: str  # folder of Parquet files, schema.SCORES and the family's columns
    latents: str  # archive of latents; empty if none was requested
    embeddings: str  # folder of Parquet files, see data.embeddings; empty if none were requested
    images: int
    rejects: int
    reasons: dict[str, int]  # the most frequent errors, with counts
    not_frontal_chest: dict[str, int]  # known properties of other images ("view LATERAL"), with counts
    images_per_s: float


@dataclass
class ScoreCounts:
    """Counts over the written parts of a run."""

    reasons: Counter[str] = field(default_factory=Counter)
    not_frontal_chest: Counter[str] = field(default_factory=Counter)

    def add(self, part: pa.Table) -> None:
        """Add a part's scores; for images that the gate has not checked, the codes of DICOM headers count."""
        rows = schema.conform_to_schema(part.select([n for n in _COUNTED.names if n in part.column_names]), _COUNTED)
        self.reasons.update(pc.drop_null(rows[schema.ERROR]).to_pylist())
        self.not_frontal_chest.update(gate.not_frontal(rows[schema.GATE]))
        unchecked = rows.filter(rows[schema.GATE].is_null())
        codes = (unchecked[name].to_pylist() for name in _CODES)
        self.not_frontal_chest += dicom_terms.other_than_frontal_chest(*codes)


def score(archive: str | Sequence[str], checkpoint_uri: str, out: str, options: ScoreOptions | None = None) -> Scored:
    """Score every image of an archive (raw, or shards), or of several archives, into OUT/scores/*.parquet.

    A rerun into the same OUT continues with the missing parts; every image ends up in exactly one row,
    scored or with `error` set.

    Raises:
        UserError: OUT has scores of other archives or another checkpoint, several archives share an image id, or
            more than `max_rejects` are unreadable.
    """
    options = options or ScoreOptions()
    archives = check_archives([archive] if isinstance(archive, str) else archive, options)
    out = storage.normalize(out)
    cluster.check_shared(out)
    precision = resolved(options.precision, "cuda" if cluster.total("GPU") else "cpu")
    options = replace(options, reading=options.reading.with_headers(out), precision=precision)
    model = checkpoint.load(checkpoint_uri)
    if options.save_latents:
        latent_encoder(model.recipe).latent_format()  # raises UserError if the family has no latents
    if options.save_embeddings:
        embedder(model.recipe)  # raises UserError if the family has none
    plans = _numbered([_plan(uri, model, options) for uri in archives])
    _check_ids(plans)
    parts = [part for plan in plans for part in plan.parts]
    settings = {
        "archive": archives[0] if len(archives) == 1 else archives,
        "checkpoint_sha256": model.about["sha256"],
        "recipe": model.recipe.to_dict(),
        "precision": precision,
        "save_images": options.save_images,
        **options.reading.describe(),
        **({"save_latents": True} if options.save_latents else {}),
        **({"save_embeddings": True} if options.save_embeddings else {}),
        **({"lung_crop": plans[0].crop.describe()} if plans[0].crop else {}),
    }
    with lease.held(out):
        run_ledger = ledger.open_ledger(out, settings, parts)
        todo = run_ledger.todo(parts)
        progress = Progress("scored", _images(parts), done=_images(parts) - _images(todo))
        missing = {part.name for part in todo}
        counts = ScoreCounts()
        for plan in plans:
            remaining = [part for part in plan.parts if part.name in missing]
            _score_parts(remaining, run_ledger, model.uri, plan, options, progress, counts)
        for part in parts:
            if part.name not in missing:  # an earlier run has written it
                counts.add(storage.read_parquet(run_ledger.file(part), columns=_COUNTED.names))
        uris = {part.name: run_ledger.file(part) for part in parts}
        if options.save_latents:
            latents.finish(storage.join(out, LATENTS), uris, model, plans[0].origin)
        if options.save_embeddings:
            network = {"checkpoint": model.uri, "sha256": model.about["sha256"], "archives": archives}
            embeddings.finish(storage.join(out, embeddings.FOLDER), uris, network)
    progress.show()
    scored = Scored(
        scores=storage.join(out, SCORES),
        latents=storage.join(out, LATENTS) if options.save_latents else "",
        embeddings=storage.join(out, embeddings.FOLDER) if options.save_embeddings else "",
        images=progress.total,
        rejects=counts.reasons.total(),
        reasons=dict(counts.reasons.most_common(20)),
        not_frontal_chest=dict(counts.not_frontal_chest.most_common()),
        images_per_s=round(progress.images_per_second, 1),
    )
    excluded = sum(count for reason, count in counts.reasons.items() if gate.is_excluded(reason))
    _check_rejects(scored, excluded, options.max_rejects)
    return scored


def _plan(archive: str, model: Checkpoint, options: ScoreOptions) -> Plan:
    if not shards.is_shards(archive):
        read_large_archive(archive, options.reading)
    plan = plan_scoring(archive, model, options.reading)
    for line in plan.notes:
        print(f"note: {line}", flush=True)
    if plan.encoded and options.save_latents:
        raise UserError(f"{archive} already contains latents: omit --save-latents")
    return plan


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
    checkpoint_uri: str,
    plan: Plan,
    options: ScoreOptions,
    progress: Progress,
    counts: ScoreCounts,
) -> None:
    """Read parts on CPUs, score and write them on GPUs if there are any; only counts return, into `counts`."""
    if not todo:
        return
    gpus = int(cluster.total("GPU"))
    share = min(1.0, cluster.total("CPU") / 2)  # CPUs per task: reading and scoring must both fit into the cluster
    workers = options.workers or gpus or max(1, int(cluster.total("CPU")) // 2)
    parts, plan = [_labeled(part) for part in todo], replace(plan, parts=[])
    read = plan.reader(options.reading.gate)
    tables = map_blocks(ray.data.from_arrow(parts), read.labeled_rows, num_cpus=share)
    scored = map_blocks(
        tables,
        PartScorer,
        pool=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        fn_constructor_args=(checkpoint_uri, run_ledger, plan, options),
        num_cpus=share,
        num_gpus=1 if gpus else None,
    )
    try:
        for row in finished(scored, [part.name for part in todo]):
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


class PartScorer:
    """A network in an actor, which scores one part at a time and writes each as one file."""

    def __init__(self, checkpoint_uri: str, run_ledger: Ledger, plan: Plan, options: ScoreOptions) -> None:
        self.run_ledger, self.plan, self.options = run_ledger, plan, options
        self.scorer = Scorer(
            checkpoint.load(checkpoint_uri),
            best_device(),
            options.batch_size,
            precision=options.precision,
            compiled=options.compile,
            note=note,
        )

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        name, count = rows[PART][0].as_py(), rows[PART_ROWS][0].as_py()
        assert rows.num_rows == count, f"Ray Data split {name}: {rows.num_rows} of {count} rows"
        scores, encoded, vectors = [], [], []
        for batch in self.scorer.batches(
            rows,
            self.plan.pixels,
            encoded=self.plan.encoded,
            render=self.options.save_images,
            save_latents=self.options.save_latents,
            save_embeddings=self.options.save_embeddings,
        ):
            scores.append(batch.scores)
            if batch.latents is not None:
                encoded.append(batch.latents)
            if batch.embeddings is not None:
                vectors.append(batch.embeddings)
            self._write_pictures(batch)
        if encoded:
            latents.write_part(storage.join(self.run_ledger.uri, LATENTS), name, pa.concat_tables(encoded))
        if self.options.save_embeddings:
            good = rows.filter(pc.is_null(rows[schema.ERROR]))
            vectors_BD = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)
            embeddings.write_part(storage.join(self.run_ledger.uri, embeddings.FOLDER), name, good, vectors_BD)
        table = self.scorer.table(rows, scores)
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write_bytes(self.run_ledger.file(Part(name, rows)), sink.getvalue())
        counts = ScoreCounts()
        counts.add(table)
        return {
            "name": [name],
            "images": [count],
            "errors": [list(counts.reasons.elements())],
            "not_frontal_chest": [list(counts.not_frontal_chest.elements())],
        }

    def _write_pictures(self, batch: ScoredBatch) -> None:
        image_ids = batch.rows[schema.IMAGE_ID].to_pylist()
        for kind, images in batch.pictures.items():
            for image_id, image in zip(image_ids, images.cpu().numpy(), strict=True):
                storage.write_bytes(storage.join(self.run_ledger.uri, kind, picture_name(image_id)), png(image))


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 (H, W), or (H, W, 3) in red, green, blue, as a PNG file."""
    good, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)  # OpenCV expects blue first
    assert good
    return data.tobytes()


def picture_name(image_id: str) -> str:
    """File name of an image's picture, unique per id: "a/b" -> "a/b.png", "a/b.png" -> "a/b.png.png"."""
    return storage.safe_path(image_id) + ".png"


def _check_rejects(scored: Scored, excluded: int, most: float) -> None:
    unusable = scored.rejects - excluded
    share = unusable / max(1, scored.images)
    if share > most:
        top = "; ".join(f"{reason} ({count})" for reason, count in list(scored.reasons.items())[:3])
        raise UserError(
            f"{unusable} of {scored.images} images ({share:.0%}) could not be read, more than --max-rejects "
            f"{most:g} allows: {top}. All other images have been scored in {scored.scores}"
        )
