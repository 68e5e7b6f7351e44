"""What every training job does around fit() and search(): data made ready, notes, pictures, the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr import checkpoint, cluster, ingest, shards, storage
from cxr.phantom.archive import write_phantom
from cxr.recipes.aecnn import AecnnRecipe
from cxr.recipes.align import AlignRecipe
from cxr.recipes.base import Batch, Recipe, SomeRecipe, check_size
from cxr.report import pareto
from cxr.report.trials import trials_table, write_search_pictures, write_trials
from cxr.schema import PixelFormat
from cxr.shard_stream import ShardStream
from cxr.sources import chestxray14
from cxr.train import RunOptions, check_resume, fit, prepare
from cxr.tune import SearchOptions, objectives_of, search, searched

PICTURED = 64  # images that the pictures of a run are made from


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions:
    """Which X-rays to use, and how they are read."""

    archive: str = ""
    """Archive or shards: a folder, s3://bucket/prefix or gs://bucket/prefix; left out, a small phantom archive."""
    source: str = "auto"
    """Layout of the archive: auto, or the name of a source."""
    shard_size: int = 256
    """Height and width at which an archive is turned into shards, pixels."""
    stream: bool = False
    """Train straight from the archive, decoding in every epoch, instead of writing shards to OUT/shards first."""
    max_rejects: float = 0.05
    """Share of images that may be unreadable before the job fails."""
    phantoms: int = 160
    """Images of the phantom archive made when none is given."""


def make_ready(options: ArchiveOptions, out: str) -> str:
    """The URI to train from: shards as given, shards made in OUT/shards, or the raw archive with `stream`."""
    archive = storage.normalise(options.archive or phantom_archive(out, options.phantoms, options.shard_size))
    if options.stream or shards.is_shards(archive):
        return archive
    made = storage.join(out, "shards")
    ingest.ingest(
        archive,
        made,
        source=options.source,
        pixels=PixelFormat(options.shard_size),
        max_rejects=options.max_rejects,
    )
    return made


def phantom_archive(out: str, count: int = 160, size: int = 256) -> str:
    """A small synthetic archive in OUT/phantoms, for a job that was given none; made once."""
    uri = storage.join(out, "phantoms")
    if not chestxray14.detect(uri):
        print(f"no --archive given: making {count} phantom X-rays in {uri}", flush=True)
        write_phantom(uri, count, size=size)
    return uri


def quick_checkpoint(archive: str, out: str) -> str:
    """An aligner trained for a minute, in OUT/aligner, for a job that was given no checkpoint; made once."""
    recipe = AlignRecipe(size=64, epochs=4, trunk="conv3", lung_phantoms=200, lung_steps=150)
    return _trained_once(recipe, archive, storage.join(out, "aligner"))


def quick_compressor(archive: str, out: str) -> str:
    """An AE-CNN trained for minutes, in OUT/compressor, for a job that was given no checkpoint; made once."""
    recipe = AecnnRecipe(
        classifier="resnet18", stem_stride=2, classifier_epochs=2, autoencoder_epochs=3, epochs=2, depth=1, width=16
    )
    return _trained_once(recipe, archive, storage.join(out, "compressor"))


def _trained_once(recipe: Recipe, archive: str, folder: str) -> str:
    kept = storage.join(folder, "checkpoint")
    if not storage.exists(storage.join(kept, checkpoint.ABOUT)):
        print(f"no --checkpoint given: training a small network of family {recipe.family} in {folder}", flush=True)
        again = RunOptions(resume=storage.exists(storage.join(folder, "train")))
        train_job(recipe, ArchiveOptions(archive=archive), again, folder)
    return kept


def settled(recipe: SomeRecipe, out: str, run: RunOptions) -> SomeRecipe:
    """The recipe with what depends on this place decided, aloud, and what its trainings share made in OUT."""
    recipe, notes = recipe.resolved()
    for note in notes:
        print(f"note: {note}", flush=True)
    return prepare(recipe, out, run)


def ready_to_begin(recipe: Recipe, archive: ArchiveOptions, out: str) -> str:
    """Join or start a cluster, after the mistakes that would otherwise show only once the archive is decoded."""
    if archive.archive and shards.is_shards(storage.normalise(archive.archive)):
        shards.read_info(storage.normalise(archive.archive))  # raises for latents
    elif not archive.stream:
        check_size(recipe, archive.shard_size)
    if archive.archive:
        storage.check_readable(archive.archive)
    cluster.connect()
    out = storage.normalise(out)
    cluster.check_shared(out)
    return out


def train_job(recipe: Recipe, archive: ArchiveOptions, run: RunOptions, out: str) -> dict[str, Any]:
    """Everything a train_<family> job does; returns its result.json."""
    check_resume(storage.join(storage.normalise(out), "train"), run.resume)
    out = ready_to_begin(recipe, archive, out)
    data = make_ready(archive, out)
    fitted = fit(settled(recipe, out, run), data, out, run, source=archive.source)
    pictures = picture(fitted.checkpoint, data, out)
    _say(fitted.metrics, fitted.checkpoint, pictures)
    return {
        "checkpoint": fitted.checkpoint,
        "metrics": fitted.metrics,
        "epochs": fitted.epochs,
        "data": data,
        "pictures": pictures,
    }


def tune_job(
    recipe: Recipe, archive: ArchiveOptions, options: SearchOptions, run: RunOptions, out: str
) -> dict[str, Any]:
    """Everything a tune_<family> job does; returns its result.json.

    Raises:
        UserError: the family does not offer the objectives, before anything is made.
        RuntimeError: no trial finished an epoch.
    """
    objectives, space = objectives_of(recipe, options), searched(recipe, options)
    out = ready_to_begin(recipe, archive, out)
    data = make_ready(archive, out)
    recipe = settled(recipe, out, run)
    trials = search(recipe, data, out, options, run, source=archive.source)
    table = write_trials(trials, recipe.monitor, out, objectives)
    print(trials_table(trials, recipe.monitor, objectives), flush=True)
    best = trials[0]
    if not best.checkpoint:
        raise RuntimeError(f"all {len(trials)} trials failed; see {table}. The first: {best.status}")
    pictures = picture(best.checkpoint, data, out)
    maximise = recipe.mode == "max"
    pictures += write_search_pictures(trials, space, recipe.monitor, maximise, out, objectives)
    pictures += pareto.write_picture(trials, objectives, out)
    _say(best.metrics, best.checkpoint, pictures)
    return {
        "checkpoint": best.checkpoint,
        "metrics": best.metrics,
        "drawn": best.drawn,
        "trials": table,
        "data": data,
        "pictures": pictures,
        **({"pareto": pareto.entries(trials, objectives)} if objectives else {}),
    }


def picture(uri: str, data: str, out: str) -> list[str]:
    """Pictures of what a checkpoint does to validation images, in OUT/pictures; their URIs."""
    if not shards.is_shards(data):
        return []
    kept = checkpoint.load(uri)
    task = kept.task().eval()
    target = storage.join(out, "pictures")
    with tempfile.TemporaryDirectory() as folder:
        task.save_pictures(lambda: _some(kept.recipe, data), Path(folder))
        storage.upload_folder(Path(folder), target)
        return [storage.join(target, path.name) for path in sorted(Path(folder).glob("*.png"))]


def _some(recipe: Recipe, data: str) -> Iterator[Batch]:
    stream = ShardStream(
        shards.read_info(data),
        "val",
        recipe.columns,
        batch_size=PICTURED,
        cache_bytes=0,
        mask_label=recipe.mask_label,
    )
    batches = stream.every()
    yield next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def _say(metrics: dict[str, float], kept: str, pictures: list[str]) -> None:
    """The end of a job, for the reader."""
    print("  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    print(f"checkpoint: {kept}")
    for uri in pictures:
        print(f"picture: {uri}", flush=True)
