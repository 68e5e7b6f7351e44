"""The study of AE-CNN: the same classifier on latents, on resized images and on uncompressed images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cxr.benchmarks.studies import aecnn, classifiers, xrays
from cxr.benchmarks.studies.aecnn import COMPRESSED, RESIZED, WHOLE
from cxr.cli.study_networks import (
    begin,
    check_options,
    images_in_words,
    known_test_labels,
    networks_record,
    scored_labels,
    write_files,
)
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.errors import UserError
from cxr.families import checkpoint, image_crop
from cxr.training.sweep import train_all

if TYPE_CHECKING:
    from cxr.cli.commands.study_aecnn import Options

_DECODED = 500  # test images, spread evenly over the split, from which the quality of decoded images is measured


def run_study(options: Options) -> dict[str, Any]:
    """Train AE-CNN and its baselines with every seed, score the test images with them, and compare the
    probabilities; returns the result.json.

    Raises:
        UserError: no test images, or none with labels, and other mistakes in the input.
    """
    recipe, run, seeds = options.recipe, options.run, options.seeds
    if not recipe.codec_is_trained:
        raise UserError(
            f"--compressor: expected published or residual, to compare with the baselines, got {recipe.compressor}: "
            f"use one of them"
        )
    compressors = {WHOLE: "none", RESIZED: "resize", COMPRESSED: recipe.compressor}
    check_options(options.data, seeds)
    archive, out = begin(options, len(compressors) * seeds)
    resolved = resolve_environment(recipe, out, run)
    data = ensure_shards(archive, out, recipe)
    recipes = {name: resolved.replace(compressor=compressor) for name, compressor in compressors.items()}
    truth = known_test_labels(data)
    sample, notes = xrays.read(data, "test", resolved, _DECODED, crop=image_crop.of_recipe(resolved))
    for note in notes:
        print(f"note: {note}", flush=True)
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    scores = scored_labels(trained, dict.fromkeys(recipes, data), truth, out)
    results = []
    for name in recipes:
        networks = [checkpoint.load(network.checkpoint) for network in trained if network.name == name]
        results.append(aecnn.summarize(classifiers.result(name, scores[name]), networks, sample))
    text = aecnn.table(results)
    tested = scores[WHOLE][0]
    summary = images_in_words(tested, "test", seeds)
    print(f"{text}{summary}", flush=True)
    page = f"{text}\n{summary}\n\n{aecnn.LEGEND}\n{classifiers.LEGEND}"
    picture = classifiers.picture([each.aurocs for each in results])
    return {
        "metrics": {"images": float(len(tested.rows)), **aecnn.metrics(results)},
        **networks_record(trained, recipes, data),
        **write_files(out, page, ("results.csv", aecnn.csv(results)), ("auroc.png", picture)),
    }
