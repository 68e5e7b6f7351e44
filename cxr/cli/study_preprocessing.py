"""The study of preprocessing: classifiers of images that are changed in one way each, compared with none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import classifiers, ensemble
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli.ensembles import score_seeds
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.plans import say_plan
from cxr.cli.study_networks import networks_record
from cxr.cli.training_jobs import connect, resolve_environment
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores, LabelTruth
from cxr.families.classify import ClassifyRecipe
from cxr.reporting import figures
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all
from cxr.wording import counted


def run_study(
    recipe: ClassifyRecipe,
    archive: ArchiveOptions,
    run: RunOptions,
    out: str,
    *,
    seeds: int,
    variants: Sequence[str],
    lungs: str,
) -> dict[str, Any]:
    """Train a classifier on each variant of the images with every seed, score the test images with them, and compare
    each variant with none; returns the result.json.

    Args:
        lungs: URI of the checkpoint for the variant lung-crop; empty: train one on the phantoms.

    Raises:
        UserError: no test image has labels, and other mistakes in the input.
    """
    if seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, got {seeds}: correct it")
    preprocessing.check_variants(variants, archive, lungs)
    archive = archive.with_headers(out)
    inputs = check_inputs(recipe, archive, out)
    out = inputs.out
    connect(out, archive, run)
    count = seeds * (1 + len(variants))
    say_plan(TrainOptions(out=out, recipe=recipe, run=run, data=archive, members=count), inputs.images)
    archive = phantoms_with_boxes(archive, out)
    recipes = preprocessing.variants(variants, resolve_environment(recipe, out, run), archive, lungs, out)
    data = preprocessing.shards_of_each(recipes, archive, out)
    plain = data[preprocessing.NONE]
    held_out = ensemble.held_out(plain, recipe)
    if held_out is None or not isinstance(held_out.truth, LabelTruth):
        raise UserError(f"{plain}: no test or validation image has labels: give an archive that has some")
    trained = train_all(recipes, range(seeds), data, out, run)
    runs = {name: score_seeds(trained, name, data[name], held_out.split, out) for name in recipes}
    scores = classifiers.joined(runs, held_out.truth)
    results = [classifiers.result(name, of) for name, of in scores.items()]
    first = scores[preprocessing.NONE][0]
    return {
        **networks_record(trained, recipes, plain),
        "shards": data,
        **write(results, first, f"{held_out.split} image", seeds, out),
    }


def write(results: Sequence[SeedResults], images: LabeledScores, kind: str, seeds: int, out: str) -> dict[str, Any]:
    """Print the table; write table.md, results.csv and auroc.png into `out`; metrics and URIs."""
    text = classifiers.table(results, "preprocessing")
    patients = counted(len(set(images.patients.tolist())), "patient")
    findings = counted(len(images.findings), "finding")
    summary = f"{counted(len(images.rows), kind)} of {patients}, {findings}, {counted(seeds, 'seed')}."
    print(f"{text}{summary}", flush=True)
    storage.write_text(storage.join(out, "table.md"), f"{text}\n{summary}\n\n{classifiers.LEGEND}")
    storage.write_text(storage.join(out, "results.csv"), classifiers.csv(results))
    picture = figures.save_figure(classifiers.picture(results), out, "auroc.png")
    print(f"picture: {picture}", flush=True)
    return {
        "metrics": {"images": float(len(images.rows)), **classifiers.metrics(results)},
        "table": storage.join(out, "results.csv"),
        "pictures": [picture],
    }
