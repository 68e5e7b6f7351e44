"""score(): a checkpoint applied to a whole archive, each image exactly once, on Ray Data."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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

from cxr import batches, checkpoint, cluster, ledger, schema, shards, storage
from cxr.dataset import quiet
from cxr.errors import UserError
from cxr.ledger import Ledger, Part
from cxr.progress import Progress
from cxr.recipes.base import Recipe, check_size
from cxr.rows import make_rows
from cxr.schema import PixelFormat
from cxr.sources import open_manifest

SCORES = "scores"  # the folder of the result's Parquet files
PART_BYTES = 64 << 20  # of decoded pixels in one part, well under the size at which Ray Data cuts a block in two
PART, PART_ROWS, SHARD, MISTAKE = "part", "part_rows", "shard", "mistake"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How an archive is scored."""

    source: str = "auto"
    """Layout of the archive: auto, or the name of a source."""
    workers: int | None = None
    """Copies of the network that score at once; unset for one a GPU, or half of the CPUs."""
    batch_size: int = 64
    """Images a forward pass."""
    save_images: bool = False
    """Also write the family's pictures, e.g. OUT/aligned/IMAGE_ID.png."""
    max_rejects: float = 0.5
    """Share of images that may be unreadable before the job fails; all others are scored all the same."""


@dataclass(frozen=True)
class Scored:
    """What a scoring run gave."""

    scores: str  # folder of Parquet files, schema.SCORES and the family's columns
    images: int
    rejects: int
    reasons: dict[str, int]  # the most frequent errors, with counts
    images_per_s: float


def score(archive: str, checkpoint_uri: str, out: str, options: ScoreOptions | None = None) -> Scored:
    """Score every image of `archive` (raw, or shards) into OUT/scores/*.parquet.

    A rerun into the same OUT goes on with the parts that are missing; every image ends up in exactly one row,
    scored or with `error` set.

    Raises:
        UserError: OUT holds scores of another archive or checkpoint, or more than `max_rejects` are unreadable.
    """
    options = options or ScoreOptions()
    archive, out = storage.normalise(archive), storage.normalise(out)
    cluster.check_shared(out)
    kept = checkpoint.load(checkpoint_uri)
    parts, pixels = _plan(archive, kept.recipe, options.source)
    settings = {
        "archive": archive,
        "checkpoint_sha256": kept.about["sha256"],
        "recipe": kept.recipe.to_dict(),
        "save_images": options.save_images,
    }
    book = ledger.open_ledger(out, settings, parts)
    todo = book.todo(parts)
    progress = Progress("scored", _images(parts), done=_images(parts) - _images(todo))
    reasons = _score_parts(todo, book, kept.uri, pixels, options, progress)
    finished = {part.name for part in parts} - {part.name for part in todo}
    for part in parts:
        if part.name in finished:
            reasons += _reasons(book.file(part))
    progress.tell()
    scored = Scored(
        scores=storage.join(out, SCORES),
        images=progress.total,
        rejects=reasons.total(),
        reasons=dict(reasons.most_common(20)),
        images_per_s=round(progress.images_per_second, 1),
    )
    _check_rejects(scored, options.max_rejects)
    return scored


def _plan(archive: str, recipe: Recipe, source: str) -> tuple[list[Part], PixelFormat]:
    """The archive cut into parts, and the size its images have when they reach the network."""
    if shards.is_shards(archive):
        info = shards.read_info(archive)
        check_size(recipe, info.pixels.size)
        return _shard_parts(info), info.pixels
    manifest = open_manifest(archive, source)
    manifest.tell()
    pixels = PixelFormat(recipe.size)
    rows = max(16, min(1024, PART_BYTES // pixels.row_bytes, math.ceil(manifest.table.num_rows / 8)))
    return ledger.plan(manifest.table, rows, folder=SCORES), pixels


def _shard_parts(info: shards.ShardInfo) -> list[Part]:
    """One part of scores a shard file, and one more for the images that ingest had rejected."""
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
    todo: list[Part], book: Ledger, kept: str, pixels: PixelFormat, options: ScoreOptions, progress: Progress
) -> Counter[str]:
    """Read parts on CPUs, score and write them on GPUs where there are any; only counts come back."""
    reasons: Counter[str] = Counter()
    if not todo:
        return reasons
    gpus = int(cluster.total("GPU"))
    share = min(1.0, cluster.total("CPU") / 2)  # of a CPU: reading and scoring must both find a place
    workers = options.workers or gpus or max(1, int(cluster.total("CPU")) // 2)
    done = (
        ray.data.from_arrow([_labelled(part) for part in todo])
        .map_batches(partial(_read, pixels=pixels), batch_size=None, batch_format="pyarrow", num_cpus=share)
        .map_batches(
            Scorer,
            fn_constructor_args=(kept, book, pixels, options.batch_size, options.save_images),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=share,
            num_gpus=1 if gpus else None,
        )
    )
    for row in quiet(done).iter_rows():
        if row[MISTAKE]:
            raise UserError(f"{row[MISTAKE]}. What is scored is kept: the same command goes on from there")
        reasons.update(row["errors"])
        progress.add(row["images"], len(row["errors"]))
    return reasons


def _labelled(part: Part) -> pa.Table:
    """A part's rows with its name, which must stay together with them on the way through Ray Data."""
    rows = part.rows.append_column(PART, pa.array([part.name] * part.rows.num_rows))
    if PART_ROWS not in rows.column_names:
        rows = rows.append_column(PART_ROWS, pa.array([part.rows.num_rows] * part.rows.num_rows))
    return rows


def _read(part: pa.Table, pixels: PixelFormat) -> pa.Table:
    """Manifest rows, or the name of a shard file -> schema rows, each with its part's name.

    A user's mistake is handed on as a value: of an exception, Ray Data keeps the text of its traceback alone.
    """
    try:
        return _rows(part, pixels)
    except UserError as error:
        return pa.table({MISTAKE: [str(error)]})


def _rows(part: pa.Table, pixels: PixelFormat) -> pa.Table:
    name, count = part[PART][0].as_py(), part[PART_ROWS][0].as_py()
    if SHARD in part.column_names:
        rows = _read_shard(part[SHARD][0].as_py(), pixels)
    else:
        rows = make_rows(part.drop_columns([PART, PART_ROWS]), pixels)
    assert rows.num_rows == count, f"{name}: planned {count} rows, read {rows.num_rows}"
    rows = rows.append_column(PART, pa.array([name] * count, pa.string()))
    return rows.append_column(PART_ROWS, pa.array([count] * count, pa.int64()))


def _read_shard(uri: str, pixels: PixelFormat) -> pa.Table:
    found = storage.read_parquet(uri)
    wanted = schema.row_schema(pixels)
    columns = [
        found[field.name] if field.name in found.column_names else pa.nulls(found.num_rows, field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


class Scorer:
    """A network in an actor: scores one part after another and writes each as one file."""

    def __init__(self, kept: str, book: Ledger, pixels: PixelFormat, batch_size: int, save_images: bool) -> None:
        loaded = checkpoint.load(kept)
        self.recipe, self.book, self.pixels = loaded.recipe, book, pixels
        self.batch_size, self.save_images = batch_size, save_images
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        memory = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.network = loaded.network.to(self.device, memory_format=memory)  # pyright: ignore[reportCallIssue]

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        if MISTAKE in rows.column_names:
            return _reply(mistake=rows[MISTAKE][0].as_py())
        try:
            return self._score(rows)
        except UserError as error:
            return _reply(mistake=str(error))

    def _score(self, rows: pa.Table) -> dict[str, Any]:
        name, count = rows[PART][0].as_py(), rows[PART_ROWS][0].as_py()
        assert rows.num_rows == count, f"{name} was cut in two on its way: {rows.num_rows} of {count} rows"
        table = self.table(rows)
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write_bytes(self.book.file(Part(name, rows)), sink.getvalue())
        errors = pc.drop_null(table[schema.ERROR]).to_pylist()
        return _reply(count, errors)

    def table(self, rows: pa.Table) -> pa.Table:
        """Scores of `rows` in their order, null where there is an error."""
        good = pc.is_null(rows[schema.ERROR])
        scores = self._scores(rows.filter(good))
        where = np.full(rows.num_rows, -1)
        where[good.to_numpy()] = np.arange(scores.num_rows)
        index = pa.array(where, mask=where < 0)
        found = {field.name: rows[field.name] for field in schema.SCORES}
        return pa.table(found | {name: scores[name].take(index) for name in scores.column_names})

    @torch.inference_mode()
    def _scores(self, rows: pa.Table) -> pa.Table:
        wanted = self.recipe.score_columns
        tables = [self._batch(rows.slice(at, self.batch_size)) for at in range(0, rows.num_rows, self.batch_size)]
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def _batch(self, rows: pa.Table) -> pa.Table:
        columns = batches.to_columns(rows, [schema.PIXELS], self.pixels)
        batch = batches.to_device(batches.to_tensors(columns, self.pixels), self.device)
        predicted = self.recipe.predict(self.network, batch)
        pictures = self.recipe.draw(self.network, batch) if self.save_images else {}
        self._write_pictures(pictures, rows[schema.IMAGE_ID].to_pylist())
        fields = self.recipe.score_columns
        return pa.table([as_arrow(predicted[field.name], field.type) for field in fields], schema=fields)

    def _write_pictures(self, pictures: dict[str, Tensor], image_ids: list[str]) -> None:
        for kind, images in pictures.items():
            for image_id, image in zip(image_ids, images.cpu().numpy(), strict=True):
                good, data = cv2.imencode(".png", image)
                assert good
                storage.write_bytes(storage.join(self.book.uri, kind, picture_name(image_id)), data.tobytes())


def _reply(images: int = 0, errors: Sequence[str] = (), mistake: str = "") -> dict[str, Any]:
    return {"images": [images], "errors": [list(errors)], MISTAKE: [mistake]}


def picture_name(image_id: str) -> str:
    """The file a picture of `image_id` is written to: "a/b.dcm" -> "a/b.dcm.png"; never outside its folder."""
    inside = "/".join(part for part in image_id.split("/") if part not in ("", ".", ".."))
    return inside if inside.lower().endswith(".png") else inside + ".png"


def as_arrow(values: Tensor, kind: pa.DataType) -> pa.Array:
    """A tensor (B,) or (B, n) as a column of plain or fixed-size list values."""
    array = values.float().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)).cast(kind.value_type), kind.list_size)
    return pa.array(array).cast(kind)


def _reasons(uri: str) -> Counter[str]:
    """The errors in a part that an earlier run has written."""
    errors = storage.read_parquet(uri, columns=[schema.ERROR])[schema.ERROR]
    return Counter(pc.drop_null(errors).to_pylist())


def _check_rejects(scored: Scored, most: float) -> None:
    share = scored.rejects / max(1, scored.images)
    if share > most:
        top = "; ".join(f"{reason} ({count})" for reason, count in list(scored.reasons.items())[:3])
        raise UserError(
            f"{scored.rejects} of {scored.images} images ({share:.0%}) could not be read, more than --max-rejects "
            f"{most:g} allows: {top}. All others are scored in {scored.scores}"
        )
