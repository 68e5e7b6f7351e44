"""score(): a checkpoint applied to a whole archive, each image exactly once, on Ray Data."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch
from torch import Tensor

from cxr import schema, storage
from cxr.data import gate, ledger, shards
from cxr.data.batch import Batch, best_device, to_columns, to_device, to_tensors
from cxr.data.decode import make_rows
from cxr.data.dicom_headers import read_large_archive
from cxr.data.ledger import Ledger, Part
from cxr.data.ray_data import finished, map_blocks
from cxr.errors import UserError
from cxr.families import checkpoint, lung_crop
from cxr.families.base import ScoringContext
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_compatible
from cxr.families.lung_crop import LungCrop
from cxr.imaging import dicom_terms
from cxr.imaging.enhance import Enhancement
from cxr.inference import latents
from cxr.inference.latents import Origin
from cxr.inference.options import ScoreOptions, check_archives
from cxr.runtime import cluster, lease
from cxr.runtime.progress import Progress
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.options import GateMode

SCORES, LATENTS = "scores", "latents"  # folders of the result
PART_BYTES = 64 << 20  # of decoded pixels in one part, well below the size at which Ray Data splits a block
_CODES = (schema.VIEW, schema.BODY_PART, schema.MODALITY)
_COUNTED = pa.schema([schema.SCORES.field(n) for n in (schema.ERROR, schema.GATE, *_CODES)])
PART, PART_ROWS, SHARD = "part", "part_rows", "shard"


@dataclass(frozen=True)
class Scored:
    """The result of a scoring run."""

    scores: str  # folder of Parquet files, schema.SCORES and the family's columns
    latents: str  # archive of latents; empty if none was requested
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
    options = replace(options, reading=options.reading.with_headers(out))
    model = checkpoint.load(checkpoint_uri)
    plans = _numbered([_plan(uri, model, options) for uri in archives])
    _check_ids(plans)
    parts = [part for plan in plans for part in plan.parts]
    settings = {
        "archive": archives[0] if len(archives) == 1 else archives,
        "checkpoint_sha256": model.about["sha256"],
        "recipe": model.recipe.to_dict(),
        "save_images": options.save_images,
        **options.reading.describe(),
        **({"save_latents": True} if options.save_latents else {}),
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
        if options.save_latents:
            uris = {part.name: run_ledger.file(part) for part in parts}
            latents.finish(storage.join(out, LATENTS), uris, model, plans[0].origin)
    progress.show()
    scored = Scored(
        scores=storage.join(out, SCORES),
        latents=storage.join(out, LATENTS) if options.save_latents else "",
        images=progress.total,
        rejects=counts.reasons.total(),
        reasons=dict(counts.reasons.most_common(20)),
        not_frontal_chest=dict(counts.not_frontal_chest.most_common()),
        images_per_s=round(progress.images_per_second, 1),
    )
    excluded = sum(count for reason, count in counts.reasons.items() if gate.is_excluded(reason))
    _check_rejects(scored, excluded, options.max_rejects)
    return scored


@dataclass(frozen=True)
class Plan:
    """An archive divided into parts, and the format of its images when they reach the network."""

    parts: list[Part]
    pixels: PixelFormat
    origin: Origin
    encoded: bool = False  # the pixels are latents
    crop: LungCrop | None = None  # how images are cropped, or were cropped when shards were made
    enhance: Enhancement | None = None  # how images are enhanced, or were enhanced then


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


def _plan(archive: str, model: Checkpoint, options: ScoreOptions) -> Plan:
    if options.save_latents:
        latent_encoder(model.recipe).latent_format()  # raises UserError if the family has no latents
    crop = lung_crop.of_checkpoint(model)
    if shards.is_shards(archive):
        options.reading.check_raw(archive)
        info = shards.read_info(archive, latents=True)
        _check_shards(info, model, options)
        shards.check_ids(info)
        origin = Origin(archive, info.source, info.findings)
        return Plan(_shard_parts(info), info.pixels, origin, bool(info.latents), crop, info.enhancement)
    read_large_archive(archive, options.reading)
    manifest = open_manifest(archive, options.reading)
    manifest.print_notes()
    pixels = PixelFormat(model.recipe.size)
    rows = max(16, min(1024, PART_BYTES // pixels.row_bytes, math.ceil(manifest.table.num_rows / 8)))
    origin = Origin(archive, find_source(archive, options.reading.source).name, manifest.findings)
    return Plan(
        ledger.plan(manifest.table, rows, folder=SCORES), pixels, origin, crop=crop, enhance=model.recipe.enhancement
    )


def _check_shards(info: shards.ShardInfo, model: Checkpoint, options: ScoreOptions) -> None:
    check_compatible([info], model)
    if info.latents is None:
        return
    if options.save_latents:
        raise UserError(f"{info.uri} already contains latents: omit --save-latents")
    latents.check_encoder(info, model)


def _shard_parts(info: shards.ShardInfo) -> list[Part]:
    """One part of scores per shard file, and one for the images that ingest rejected."""
    files = [file for split in sorted(info.parts) for file in info.parts[split]]
    rejects = [storage.join(info.uri, shards.REJECTS_FILE)] if info.rejects else []
    listed = [(file.uri, file.rows) for file in files] + [(uri, info.rejects) for uri in rejects]
    return [
        Part(f"{SCORES}/part-{number:05d}", pa.table({SHARD: [uri], PART_ROWS: [rows]}))
        for number, (uri, rows) in enumerate(listed)
    ]


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
    read = partial(_read, pixels=plan.pixels, crop=plan.crop, enhance=plan.enhance, check=options.reading.gate)
    tables = map_blocks(ray.data.from_arrow([_labeled(part) for part in todo]), read, num_cpus=share)
    scored = map_blocks(
        tables,
        Scorer,
        pool=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        fn_constructor_args=(checkpoint_uri, run_ledger, replace(plan, parts=[]), options),
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


def _read(
    part: pa.Table, pixels: PixelFormat, crop: LungCrop | None, enhance: Enhancement | None, check: GateMode
) -> pa.Table:
    """Manifest rows, or the name of a shard file -> schema rows, each with the name of its part."""
    name, count = part[PART][0].as_py(), part[PART_ROWS][0].as_py()
    if SHARD in part.column_names:
        rows = schema.conform_to_schema(storage.read_parquet(part[SHARD][0].as_py()), schema.row_schema(pixels))
    else:
        manifest = part.drop_columns([PART, PART_ROWS])
        rows = make_rows(manifest, pixels, crop=crop.loaded() if crop else None, enhance=enhance, check=check)
    assert rows.num_rows == count, f"{name}: planned {count} rows, read {rows.num_rows}"
    rows = rows.append_column(PART, pa.array([name] * count, pa.string()))
    return rows.append_column(PART_ROWS, pa.array([count] * count, pa.int64()))


class Scorer:
    """A network in an actor, which scores one part at a time and writes each as one file."""

    def __init__(self, checkpoint_uri: str, run_ledger: Ledger, plan: Plan, options: ScoreOptions) -> None:
        loaded = checkpoint.load(checkpoint_uri)
        self.recipe, self.findings, self.run_ledger = loaded.recipe, loaded.findings, run_ledger
        self.plan, self.options = plan, options
        self.device = best_device()
        memory = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.network = loaded.network.to(self.device, memory_format=memory)  # pyright: ignore[reportCallIssue]

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        name, count = rows[PART][0].as_py(), rows[PART_ROWS][0].as_py()
        assert rows.num_rows == count, f"Ray Data split {name}: {rows.num_rows} of {count} rows"
        table, encoded = self.table(rows)
        if encoded is not None and encoded.num_rows:
            latents.write_part(storage.join(self.run_ledger.uri, LATENTS), name, encoded)
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

    def table(self, rows: pa.Table) -> tuple[pa.Table, pa.Table | None]:
        """Scores of `rows` in their order, null for rows with errors, and latents of the others if requested."""
        good = pc.is_null(rows[schema.ERROR])
        scores, encoded = self._scores(rows.filter(good))
        where = np.full(rows.num_rows, -1)
        where[good.to_numpy()] = np.arange(scores.num_rows)
        index = pa.array(where, mask=where < 0)
        identity = {field.name: rows[field.name] for field in schema.SCORES}
        table = pa.table(identity | {name: scores[name].take(index) for name in scores.column_names})
        return table.replace_schema_metadata({schema.FINDINGS_KEY: json.dumps(self.findings)}), encoded

    @torch.inference_mode()
    def _scores(self, rows: pa.Table) -> tuple[pa.Table, pa.Table | None]:
        step = self.options.batch_size
        batches = [self._batch(rows.slice(at, step)) for at in range(0, rows.num_rows, step)]
        scores = [self.recipe.score_columns.empty_table(), *(scored for scored, _ in batches)]
        encoded = [latents for _, latents in batches if latents is not None]
        return pa.concat_tables(scores), pa.concat_tables(encoded) if encoded else None

    def _batch(self, rows: pa.Table) -> tuple[pa.Table, pa.Table | None]:
        columns = to_columns(rows, [schema.PIXELS], self.plan.pixels)
        batch = to_device(to_tensors(columns, self.plan.pixels), self.device)
        encoded = None
        if self.options.save_latents:  # predictions are made from the stored latents
            encoder = latent_encoder(self.recipe)
            batch = {schema.PIXELS: encoder.encode(self.network, batch)}
            encoded = latents.with_latents(
                rows, self.plan.pixels, batch[schema.PIXELS].cpu().numpy(), encoder.latent_format()
            )
        predicted, pictures = self._predicted(batch)
        self._write_pictures(pictures, rows[schema.IMAGE_ID].to_pylist())
        context = ScoringContext(self.findings, self.plan.pixels.size)
        return self.recipe.scored(predicted, rows, context), encoded

    def _predicted(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predictions and, if requested, pictures of a batch whose pixels are images or latents."""
        recipe, drawing = self.recipe, self.options.save_images
        if self.plan.encoded or self.options.save_latents:
            encoder = latent_encoder(recipe)
            pictures = encoder.render_latents(self.network, batch) if drawing else {}
            return encoder.predict_latents(self.network, batch), pictures
        return recipe.predict(self.network, batch), recipe.render(self.network, batch) if drawing else {}

    def _write_pictures(self, pictures: dict[str, Tensor], image_ids: list[str]) -> None:
        for kind, images in pictures.items():
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
