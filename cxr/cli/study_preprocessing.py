"""The study of preprocessing: classifiers of images that are changed in one way each, compared with none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cxr.benchmarks.studies import classifiers
from cxr.cli import preprocessing_variants as preprocessing
from cxr.cli.ensembles import score_seeds
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import begin, check_options, labeled_images, networks_record, write_classifiers
from cxr.cli.training_jobs import resolve_environment
from cxr.training.sweep import train_all

if TYPE_CHECKING:
    from cxr.cli.commands.study_preprocessing import Options


def run_study(options: Options) -> dict[str, Any]:
    """Train a classifier on each variant of the images with every seed, score the test images with them, and compare
    each variant with none; returns the result.json.

    Raises:
        UserError: no test or validation image has labels, and other mistakes in the input.
    """
    recipe, run, variants, seeds = options.recipe, options.run, options.preprocessing, options.seeds
    check_options(options.data, seeds)
    preprocessing.check_variants(variants, recipe, options.data, options.lungs)
    archive, out = begin(options, seeds * (1 + len(variants)))
    archive = phantoms_with_boxes(archive, out)
    recipe = resolve_environment(recipe, out, run)
    plain = preprocessing.plain_shards(recipe, archive, out)
    split, truth = labeled_images(plain, recipe)
    recipes = preprocessing.variants(variants, recipe, archive, options.lungs, out)
    data = preprocessing.shards_of_each(recipes, plain, archive, out)
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    runs = {name: score_seeds(trained, name, data[name], split, out) for name in recipes}
    scores = classifiers.joined(runs, truth)
    results = [classifiers.result(name, of) for name, of in scores.items()]
    images = scores[preprocessing.NONE][0]
    written = write_classifiers(results, "preprocessing", images, split, seeds, out)
    return {**networks_record(trained, recipes, plain), "shards": data, **written}
