"""The steps of every training job around fit(): preparing data, notes, pictures, the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.cli.commands import ingest as ingest_command
from cxr.cli.inputs import SHARDS, check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.phantoms import phantom_archive
from cxr.cli.plans import say_plan
from cxr.data import ingest, shards
from cxr.data.batch import Batch
from cxr.data.shard_loader import ShardStream
from cxr.families import checkpoint, checkpoint_files, image_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.base import Recipe, SomeRecipe
from cxr.families.compatibility import check_ray_reader, fold_of
from cxr.families.lungs import LungsRecipe
from cxr.families.presets import RECIPE_FILE, preset
from cxr.models import pretrained
from cxr.phantom.archive import SMALLEST_PX
from cxr.reporting import folds
from cxr.runtime import cluster
from cxr.schema import PixelFormat
from cxr.training import mlflow_log
from cxr.training.fit import begun_with, fit, room
from cxr.training.mlflow_log import MlflowLog
from cxr.training.options import RunOptions, check_resume
from cxr.training.shared_pretraining import prepare
from cxr.training.sweep import train_all

PICTURED = 64  # number of validation images for the pictures of a run


def ensure_shards(options: ArchiveOptions, out: str, recipe: Recipe | None = None) -> str:
    """The URI to train from: shards as given, shards made in OUT/shards, or the raw archive with `stream`.

    Several archives are made into OUT/shards-1, OUT/shards-2 … where they are not shards already, and OUT/shards
    stands for all of them.

    Args:
        recipe: says how images are cropped and enhanced when shards are made; None: not at all.
    """
    archives = options.uris or [phantom_archive(out, options.phantoms, max(SMALLEST_PX, options.stored_size))]
    if len(archives) == 1:
        return archives[0] if options.stream else _shards_of(archives[0], storage.join(out, SHARDS), options, recipe)
    made = [
        _shards_of(archive, storage.join(out, f"{SHARDS}-{number}"), options, recipe)
        for number, archive in enumerate(archives, 1)
    ]
    return shards.join_shards(storage.join(out, SHARDS), made, archives).uri


def _shards_of(archive: str, made: str, options: ArchiveOptions, recipe: Recipe | None) -> str:
    """The archive itself if it consists of shards, otherwise shards of it, made at `made`."""
    if shards.is_shards(archive):
        return archive
    ingest.ingest(
        archive,
        made,
        reading=options.reading,
        pixels=PixelFormat(options.stored_size),
        max_rejects=options.max_rejects,
        crop=image_crop.of_recipe(recipe) if recipe else None,
        enhance=recipe.enhancement if recipe else None,
        labeling=options.labeling,
        on_start=partial(
            say_plan, ingest_command.Options(archive=archive, out=made, stored_size=options.stored_size)
        ),
    )
    return made


def demo_aligner_checkpoint(archive: str, out: str) -> str:
    """An aligner of preset `demo` in OUT/aligner, for a job without a checkpoint; trained in the first call."""
    return _trained_once(preset(AlignRecipe, "demo"), archive, storage.join(out, "aligner"))


def demo_compressor_checkpoint(archive: str, out: str) -> str:
    """An AE-CNN of preset `demo` in OUT/compressor, for a job without a checkpoint; trained in the first call."""
    return _trained_once(preset(AecnnRecipe, "demo"), archive, storage.join(out, "compressor"))


def demo_lung_checkpoint(archive: str, out: str) -> str:
    """A lung network of preset `demo` in OUT/lungs, for a job without a checkpoint; trained in the first call."""
    return _trained_once(preset(LungsRecipe, "demo"), archive, storage.join(out, "lungs"))


def _trained_once(recipe: Recipe, archive: str, folder: str) -> str:
    saved = storage.join(folder, "checkpoint")
    if not storage.exists(storage.join(saved, checkpoint_files.ABOUT)):
        print(f"no checkpoint given: training a small network of family {recipe.family} in {folder}", flush=True)
        begun = storage.exists(storage.join(folder, "train"))
        train_job(recipe, ArchiveOptions(archive=(archive,)), RunOptions(), folder, resume=begun)
    return saved


def resolve_environment(recipe: SomeRecipe, out: str, run: RunOptions, *, resume: bool = False) -> SomeRecipe:
    """The recipe with its initial weights and shared pretraining stored in OUT; prints notes."""
    if recipe.crop_setting:
        recipe = recipe.with_crop_checkpoint(storage.normalize(recipe.crop_checkpoint))
    begun = begun_with(out) if resume else None
    recipe, notes = recipe.resolve_weights(out) if begun is None else recipe.resume_from(begun, out)
    for note in notes:
        print(f"note: {note}", flush=True)
    return prepare(recipe, out, run)


def connect(out: str, archive: ArchiveOptions, run: RunOptions) -> None:
    """Join or start a Ray cluster, and check that it reaches `out` and has room for the run."""
    mlflow_log.check_installed()
    cluster.connect()
    cluster.check_shared(out)
    room(run, raw=archive.stream or run.shard_reader == "ray")


def train_job(
    recipe: Recipe, archive: ArchiveOptions, run: RunOptions, out: str, *, resume: bool = False
) -> dict[str, Any]:
    """The body of a train_<family> job; returns its result.json. Trains all folds if none is named."""
    if run.shard_reader == "ray":
        check_ray_reader(recipe)
    if recipe.folds and recipe.fold is None:
        return train_folds_job(recipe, archive, run, out)
    check_resume(storage.join(storage.normalize(out), "train"), resume)
    archive = archive.with_headers(out)
    inputs = check_inputs(recipe, archive, out)
    out = inputs.out
    connect(out, archive, run)
    say_plan(TrainOptions(out=out, recipe=recipe, run=run, data=archive), inputs.images)
    recipe = resolve_environment(recipe, out, run, resume=resume)
    storage.write_json(storage.join(out, RECIPE_FILE), recipe.to_dict())
    data = ensure_shards(archive, out, recipe)
    fitted = fit(recipe, data, out, run, reading=archive.reading, labeling=archive.labeling, resume=resume)
    pictures = picture(fitted.checkpoint, data, out)
    MlflowLog.of(out).send_pictures(pictures)
    print_result(fitted.metrics, fitted.checkpoint, pictures)
    return {
        "checkpoint": fitted.checkpoint,
        "metrics": fitted.metrics,
        "epochs": fitted.epochs,
        "data": data,
        "pictures": pictures,
        **training_record(recipe),
    }


def training_record(recipe: Recipe) -> dict[str, Any]:
    """The record of a trained recipe in result.json: its settings, and the origin of its initial weights.

    This is what was used, while `settings` is what was requested: `auto` may not have found weights.
    """
    return {"recipe": recipe.to_dict(), "initial_weights": pretrained.sources(recipe)}


def train_folds_job(recipe: Recipe, archive: ArchiveOptions, run: RunOptions, out: str) -> dict[str, Any]:
    """Train a network for each of `recipe.folds`, in OUT/fold-0/seed-SEED …, in parallel; returns the result.json.

    Its metrics are means over the folds, NAME_sd their standard deviations. Finished folds of an earlier call are
    kept, and killed ones resume.
    """
    numbered = [recipe.replace(fold=number) for number in range(recipe.folds)]
    archive = archive.with_headers(out)
    inputs = check_inputs(numbered[0], archive, out)
    out = inputs.out
    connect(out, archive, run)
    say_plan(TrainOptions(out=out, recipe=recipe, run=run, data=archive), inputs.images)
    resolved = resolve_environment(numbered[0], out, run)
    storage.write_json(storage.join(out, RECIPE_FILE), resolved.replace(fold=None).to_dict())
    data = ensure_shards(archive, out, recipe)
    recipes = {f"fold-{fold.fold}": resolved.replace(fold=fold.fold) for fold in numbered}
    trained = train_all(recipes, (recipe.seed,), data, out, run, reading=archive.reading)
    metrics = [checkpoint_files.read_about(network.checkpoint)["metrics"] for network in trained]
    print(folds.table(metrics), flush=True)
    for network in trained:
        print(f"checkpoint of {network.name}: {network.checkpoint}", flush=True)
    return {
        "metrics": folds.together(metrics),
        "folds": [
            {"fold": number, "checkpoint": network.checkpoint, "metrics": of_fold}
            for number, (network, of_fold) in enumerate(zip(trained, metrics, strict=True))
        ],
        "data": data,
        **training_record(resolved.replace(fold=None)),
    }


def picture(uri: str, data: str, out: str) -> list[str]:
    """Pictures of a checkpoint's predictions on validation images, in OUT/pictures; their URIs."""
    if not shards.is_shards(data):
        return []
    loaded = checkpoint.load(uri)
    task = loaded.task().eval()
    target = storage.join(out, "pictures")
    with tempfile.TemporaryDirectory() as folder:
        stream = _pictured(loaded.recipe, data)
        task.save_pictures(lambda: _first(stream), Path(folder), stream.first_ids(PICTURED))
        storage.upload_folder(Path(folder), target)
        return [storage.join(target, path.name) for path in sorted(Path(folder).glob("*.png"))]


def _pictured(recipe: Recipe, data: str) -> ShardStream:
    return ShardStream(
        shards.read_info(data),
        "val",
        recipe.columns,
        batch_size=PICTURED,
        cache_bytes=0,
        mask_label=recipe.mask_label,
        fold=fold_of(recipe),
    )


def _first(stream: ShardStream) -> Iterator[Batch]:
    batches = stream.every()
    yield next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def print_result(metrics: dict[str, float], checkpoint_uri: str, pictures: list[str]) -> None:
    """Print the metrics and the paths at the end of a job."""
    print("  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    print(f"checkpoint: {checkpoint_uri}")
    for uri in pictures:
        print(f"picture: {uri}", flush=True)
