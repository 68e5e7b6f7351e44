"""Code that the studies share: their start, labels of test images, the files that they write, and result.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure

from cxr import schema, storage
from cxr.benchmarks.studies import classifiers, ensemble
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.cli.ensembles import score_seeds
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.training_jobs import connect, training_record
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores, LabelTruth, known_labels
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.run import Split
from cxr.families.base import Recipe
from cxr.reporting import figures
from cxr.sources.options import ALL_IMAGES
from cxr.training.options import RunOptions
from cxr.training.sweep import Trained


class Study(Protocol):
    """Options that every study has."""

    @property
    def out(self) -> str: ...

    @property
    def data(self) -> ArchiveOptions: ...

    @property
    def recipe(self) -> Recipe: ...

    @property
    def run(self) -> RunOptions: ...


def check_options(data: ArchiveOptions, seeds: int) -> None:
    """Raise UserError unless the networks of a study can be evaluated on the same shards, with some seed."""
    if data.stream:
        raise UserError("expected shards, on which all networks are evaluated, got --stream: omit it")
    if seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, got {seeds}")


def begin(study: Study, networks: int) -> tuple[ArchiveOptions, str]:
    """Check the input, join or start the cluster, and show the plan for so many networks; the archive with the
    headers that were scanned, and the normalized `out`.

    Raises:
        UserError: a mistake in the input, or a cluster that cannot run the study.
    """
    archive = study.data.with_headers(study.out)
    inputs = check_inputs(study.recipe, archive, study.out)
    connect(inputs.out, archive, study.run)
    options = TrainOptions(out=inputs.out, recipe=study.recipe, run=study.run, data=archive, members=networks)
    say_plan(options, inputs.images)
    return archive, inputs.out


def scored_labels(trained: Sequence[Trained], data: Mapping[str, str], out: str) -> dict[str, list[LabeledScores]]:
    """The scores of the test images by each recipe's networks, with labels; see `classifiers.joined`.

    Args:
        data: URI of each recipe's shards by its name; all have the same images, labeled as in the first.
        out: the folder of the study.
    """
    first = next(iter(data.values()))
    truth = known_labels(read_truth(first, ALL_IMAGES, "test", [schema.PATIENT_ID, schema.LABELS]))
    runs = {name: score_seeds(trained, name, uri, "test", out) for name, uri in data.items()}
    return classifiers.joined(runs, truth)


def labeled_images(data: str, recipe: Recipe) -> tuple[Split, LabelTruth]:
    """The labels of the test split of shards, or else of the val split.

    Raises:
        UserError: neither has labels.
    """
    held_out = ensemble.held_out(data, recipe)
    if held_out is None or not isinstance(held_out.truth, LabelTruth):
        raise UserError(f"{data}: no test or validation image has labels: use an archive that has some")
    return held_out.split, held_out.truth


def networks_record(trained: Sequence[Trained], recipes: Mapping[str, Recipe], data: str) -> dict[str, Any]:
    """For result.json: checkpoints by name and seed, the shards, and each recipe with its initial weights."""
    return {
        "checkpoints": {f"{network.name}, seed {network.seed}": network.checkpoint for network in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
    }


def write_classifiers(results: Sequence[SeedResults], title: str, summary: str, out: str) -> dict[str, Any]:
    """Print the table of classifiers; write table.md, results.csv and auroc.png into `out`; metrics and URIs."""
    text = classifiers.table(results, title)
    print(f"{text}{summary}", flush=True)
    page, picture = f"{text}\n{summary}\n\n{classifiers.LEGEND}", classifiers.picture(results)
    files = write_files(out, page, ("results.csv", classifiers.csv(results)), ("auroc.png", picture))
    return {"metrics": classifiers.metrics(results), **files}


def write_files(out: str, page: str, table: tuple[str, str], picture: tuple[str, Figure]) -> dict[str, Any]:
    """Write table.md, a table and a picture, each with its name, into `out`, and print the picture's URI; URIs for
    result.json."""
    storage.write_text(storage.join(out, "table.md"), page)
    (name, rows), (picture_name, figure) = table, picture
    storage.write_text(storage.join(out, name), rows)
    uri = figures.save_figure(figure, out, picture_name)
    print(f"picture: {uri}", flush=True)
    return {"table": storage.join(out, name), "pictures": [uri]}
