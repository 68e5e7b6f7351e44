"""The study of AE-CNN: the same classifier on latents, on resized images and on uncompressed images."""

from __future__ import annotations

from typing import Any

from cxr import schema, storage
from cxr.benchmarks.studies import aecnn, classifiers, xrays
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.study_networks import networks_record, scored
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment
from cxr.errors import UserError
from cxr.evaluation.classification_data import known_labels
from cxr.evaluation.ground_truth import read_truth
from cxr.families import checkpoint, image_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.reporting import figures
from cxr.sources.options import ALL_IMAGES
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
        UserError: no test images, or none with labels, and other mistakes in the input.
    """
    compressors = {WHOLE: "none", RESIZED: "resize", COMPRESSED: recipe.compressor}
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
    truth = read_truth(data, ALL_IMAGES, "test", [schema.PATIENT_ID, schema.LABELS])
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    networks = {name: [network for network in trained if network.name == name] for name in recipes}
    runs = {name: [scored(network, data) for network in of_name] for name, of_name in networks.items()}
    scores = classifiers.joined(runs, known_labels(truth))
    results = []
    for name, of_name in networks.items():
        checkpoints = [checkpoint.load(network.checkpoint) for network in of_name]
        results.append(aecnn.summarize(classifiers.result(name, scores[name]), checkpoints, sample))
    text = aecnn.table(results)
    tested = scores[WHOLE][0]
    images, patients = len(tested.rows), len(set(tested.patients.tolist()))
    summary = f"{counted(images, 'test image')} of {counted(patients, 'patient')}, {counted(seeds, 'seed')}."
    print(f"{text}{summary}", flush=True)
    storage.write_text(storage.join(out, "table.md"), f"{text}\n{summary}\n\n{classifiers.LEGEND}")
    picture = figures.save_figure(classifiers.picture([each.aurocs for each in results]), out, "auroc.png")
    print(f"picture: {picture}", flush=True)
    return {
        "metrics": {"images": float(images), **aecnn.metrics(results)},
        **networks_record(trained, recipes, data),
        "pictures": [picture],
    }
