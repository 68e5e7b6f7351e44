"""The study of AE-CNN: the same classifier on latents, on resized images and on uncompressed images."""

from __future__ import annotations

from typing import Any

from cxr import storage
from cxr.benchmarks.studies import aecnn, classification, xrays
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.study_networks import networks_record, scored
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.labeled_scores import labeled_scores
from cxr.evaluation.run import ReportOptions
from cxr.families import checkpoint, image_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.reporting import figures
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all
from cxr.wording import counted

COMPRESSED, RESIZED, WHOLE = "ae-cnn", "resized", "uncompressed"
_DECODED = 500  # test images, spread evenly over the split, from which the quality of decoded images is measured


def run_study(
    recipe: AecnnRecipe, archive: ArchiveOptions, run: RunOptions, out: str, *, seeds: int
) -> dict[str, Any]:
    """Train AE-CNN and its baselines with every seed, score the test images with them, and compare the
    probabilities; returns the result.json.

    Raises:
        UserError: no test image has labels, and other mistakes in the input.
    """
    compressors = {COMPRESSED: recipe.compressor, RESIZED: "resize", WHOLE: "none"}
    if archive.stream or seeds < 1:
        raise UserError(
            "networks are evaluated on shards, with at least 1 seed: omit --stream, and give --seeds 1 or more"
        )
    archive = archive.with_headers(out)
    inputs = check_inputs(recipe, archive, out)
    out = inputs.out
    connect(out, archive, run)
    members = len(compressors) * seeds
    say_plan(TrainOptions(out=out, recipe=recipe, run=run, data=archive, members=members), inputs.images)
    resolved = resolve_environment(recipe, out, run)
    data = ensure_shards(archive, out, recipe)
    recipes = {name: resolved.replace(compressor=compressor) for name, compressor in compressors.items()}
    sample, notes = xrays.read(data, "test", resolved, _DECODED, crop=image_crop.of_recipe(resolved))
    for note in notes:
        print(f"note: {note}", flush=True)
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    tested, results = dict[str, list[LabeledScores]](), list[aecnn.CompressionResult]()
    for name in recipes:
        of_name = [network for network in trained if network.name == name]
        tested[name] = [
            labeled_scores(scored(network, data), data, ReportOptions(split="test")) for network in of_name
        ]
        networks = [checkpoint.load(network.checkpoint) for network in of_name]
        results.append(aecnn.summarize(classification.summarize(name, tested[name]), networks, sample))
        print(f"evaluated: {name}", flush=True)
    text = aecnn.table(results)
    images, patients = len(tested[WHOLE][0].rows), len(set(tested[WHOLE][0].patients.tolist()))
    summary = f"{counted(images, 'test image')} of {counted(patients, 'patient')}, {counted(seeds, 'seed')}"
    print(f"{text}{summary}", flush=True)
    storage.write_text(storage.join(out, "table.md"), f"{text}\n{summary}\n")
    picture = figures.save_figure(classification.picture([each.classification for each in results]), out, "auroc.png")
    print(f"picture: {picture}", flush=True)
    return {
        "metrics": {"images": float(images), **aecnn.metrics(results)},
        **networks_record(trained, recipes, data),
        "pictures": [picture],
    }
