"""The study of AE-CNN: the same classifier on latents, on resized images and on uncompressed images."""

from __future__ import annotations

from typing import Any

from cxr import storage
from cxr.benchmarks.studies import aecnn, xrays
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.study_networks import load_networks, networks_record
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment
from cxr.families import lung_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.reporting import figures
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all
from cxr.wording import counted

COMPRESSED, RESIZED, WHOLE = "ae-cnn", "resized", "uncompressed"


def run_study(
    recipe: AecnnRecipe, archive: ArchiveOptions, run: RunOptions, out: str, *, seeds: int, test_images: int
) -> dict[str, Any]:
    """Train AE-CNN and its baselines with every seed, and compare them on test images; returns the result.json."""
    compressors = {COMPRESSED: recipe.compressor, RESIZED: "resize", WHOLE: "none"}
    archive = archive.with_headers(out)
    inputs = check_inputs(recipe, archive, out)
    out = inputs.out
    connect(out, archive, run)
    members = len(compressors) * seeds
    say_plan(TrainOptions(out=out, recipe=recipe, run=run, data=archive, members=members), inputs.images)
    resolved = resolve_environment(recipe, out, run)
    data = ensure_shards(archive, out, recipe)
    recipes = {name: resolved.replace(compressor=compressor) for name, compressor in compressors.items()}
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    networks = {name: load_networks(trained, name) for name in recipes}
    crop = lung_crop.of_recipe(resolved)
    test, notes = xrays.read(data, "test", resolved, test_images, archive.reading, crop)
    for note in notes:
        print(f"note: {note}", flush=True)
    results = aecnn.variants(networks, test)
    text = aecnn.table(results)
    patients = counted(len(set(test.patients)), "patient")
    summary = f"{counted(len(test.pixels), 'test image')} of {patients}, {counted(seeds, 'seed')}"
    print(f"{text}{summary}", flush=True)
    storage.write_text(storage.join(out, "table.md"), f"{text}\n{summary}\n")
    picture = figures.save_figure(aecnn.picture(results), out, "auroc.png")
    print(f"picture: {picture}", flush=True)
    return {
        "metrics": {"images": float(len(test.pixels)), **aecnn.metrics(results)},
        **networks_record(trained, recipes, data),
        "pictures": [picture],
    }
