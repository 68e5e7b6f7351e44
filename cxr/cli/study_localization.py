"""The study of localization: maps from several stages compared with the last stage, with seeds and baselines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cxr.benchmarks.studies import localization, localization_report
from cxr.benchmarks.studies.localization import Evaluated
from cxr.cli.ensembles import score_seeds
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import begin, check_names, check_options, check_tested, networks_record, write_files
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.errors import UserError
from cxr.evaluation.detection_data import named as boxed_findings
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.run import ReportOptions
from cxr.families.localize import LocalizeRecipe
from cxr.metrics.bootstrap import RESAMPLES
from cxr.training.sweep import train_all
from cxr.wording import counted

if TYPE_CHECKING:
    from cxr.cli.commands.study_localization import Options

MULTISCALE, LAST = "multiscale", "last"
# Settings in which each variant's recipe differs from that of the job.
VARIANTS: dict[str, dict[str, str]] = {
    MULTISCALE: {"cam_stages": "all", "stage_weights": "learned"},
    "logits": {"cam_stages": "all", "stage_weights": "learned", "combine_stages": "logits"},
    "uniform": {"cam_stages": "all", "stage_weights": "uniform"},
    LAST: {"cam_stages": "last"},
    **{
        f"{MULTISCALE}-{pooling}": {"cam_stages": "all", "stage_weights": "learned", "pooling": pooling}
        for pooling in ("mean", "max", "lse")
    },
    **{f"{LAST}-{pooling}": {"cam_stages": "last", "pooling": pooling} for pooling in ("mean", "max", "lse")},
}
FINDINGS = ("Cardiomegaly", "Mass", "Nodule")  # of the phantoms: large, smaller, small


def run_study(options: Options) -> dict[str, Any]:
    """Train every variant with every seed, score the test images with them, and compare the boxes; returns the
    result.json.

    Raises:
        UserError: no test image has a box of a finding, and other mistakes in the input.
    """
    recipe, run, seeds = options.recipe, options.run, options.seeds
    chosen = named(options.variants, recipe)
    check_options(options.data, seeds)
    archive, out = begin(options, len(chosen) * seeds)
    recipes = {name: resolve_environment(recipe, out, run) for name, recipe in chosen.items()}
    data = ensure_shards(phantoms_with_boxes(archive, out, FINDINGS), out, recipe)
    check_tested(data)
    truth = known_boxes(data, ReportOptions(split="test"))
    if not boxed_findings(truth) & {*truth.labels.findings}:
        raise UserError(
            f"{data}: none of {truth.table.num_rows:,} images of its test split has a box of "
            f"{', '.join(truth.labels.findings)}: use an archive that has such boxes"
        )
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    results, evaluated = [], []
    for name in recipes:
        evaluated = [Evaluated.of(run, truth) for run in score_seeds(trained, name, data, "test", out)]
        results.append(localization.summarize(name, evaluated))
        print(f"evaluated: {name}", flush=True)
    return {
        **networks_record(trained, recipes, data),
        **write(results, evaluated[0], truth, seeds, out),
    }


def named(names: Sequence[str], recipe: LocalizeRecipe) -> dict[str, LocalizeRecipe]:
    """The recipe of each of these variants, by name.

    Raises:
        UserError: a variant is unknown, there is none, or two do not differ in any setting.
    """
    if not names:
        raise UserError(f"--variants: expected some of {', '.join(VARIANTS)}, got none: use these names")
    check_names("--variants", names, VARIANTS)
    recipes = {name: recipe.replace(**VARIANTS[name]) for name in names}
    for first, second in itertools.combinations(names, 2):
        if recipes[first] == recipes[second]:
            raise UserError(
                f"--variants: expected variants that differ, got {first} and {second}, which are the same with these "
                f"settings: omit one"
            )
    return recipes


def write(
    results: Sequence[localization.LocalizationResult], network: Evaluated, truth: BoxTruth, seeds: int, out: str
) -> dict[str, Any]:
    """Print the tables; write table.md, networks.csv and accuracy.png into `out`; metrics and URIs.

    Args:
        network: any of the networks, all of which have scored the same images.
    """
    by_name = {result.name: result for result in results}
    gains = localization.gains(by_name[MULTISCALE], by_name[LAST]) if {MULTISCALE, LAST} <= set(by_name) else {}
    findings = results[0].findings
    gained = localization_report.gains_table(gains, findings, MULTISCALE, LAST) if gains else ""
    shown = [*results, *localization.baseline_results(network, truth)]
    counts, test_images = network.pairs(), len(network.boxes.rows)
    boxed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    images = counted(test_images, "test image")
    summary = f"{images}, of these with a box: {boxed}; {counted(seeds, 'seed')}."
    print(f"{localization_report.tables(shown)}{gained}{summary}", flush=True)
    page, rows = localization_report.page(shown, gained, summary, RESAMPLES), localization_report.csv(shown)
    picture = localization_report.picture(shown)
    files = write_files(out, page, ("networks.csv", rows), ("accuracy.png", picture))
    metrics = {"images": float(test_images), **{f"pairs/{name}": float(n) for name, n in counts.items()}}
    metrics |= localization.metrics(shown, gains)
    return {"metrics": metrics, **files}
