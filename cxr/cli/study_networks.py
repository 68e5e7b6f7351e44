"""Code that the studies share: checks, start, ground truth of test images, files that they write, result.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure

from cxr import schema, storage
from cxr.benchmarks.studies import classifiers, ensemble
from cxr.benchmarks.studies.ensemble import HeldOut
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.cli.ensembles import score_seeds
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.plans import say_plan
from cxr.cli.training_jobs import connect, training_record
from cxr.data import shards
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores, LabelTruth, known_labels
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.run import Split
from cxr.families.base import Recipe
from cxr.families.compatibility import check_ray_reader
from cxr.reporting import figures
from cxr.runtime import console
from cxr.sources.options import ALL_IMAGES
from cxr.training.options import RunOptions
from cxr.training.sweep import Trained
from cxr.wording import counted

IMAGE: Mapping[Split, str] = {"test": "test image", "val": "validation image"}  # an image of a split, in words


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


# ---- Before the cluster starts


def check_options(data: ArchiveOptions, seeds: int, option: str = "--seeds") -> None:
    """Raise UserError unless the networks of a study can be evaluated on the same shards, with some seed."""
    if data.stream:
        raise UserError("expected shards, on which all networks are evaluated, got --stream: omit it")
    if seeds < 1:
        raise UserError(f"{option}: expected 1 or more, got {seeds}")


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise UserError unless these are known names, each of them once."""
    if unknown := set(names) - set(known):
        raise UserError(
            f"{option}: expected some of {', '.join(known)}, got {' '.join(sorted(unknown))}: use these names"
        )
    check_different(option, names)


def check_different(option: str, values: Sequence[object]) -> None:
    """Raise UserError if a value is given twice."""
    if len(set(values)) < len(values):
        raise UserError(f"{option}: expected each value once, got {' '.join(map(str, values))}: omit repeated ones")


def check_originals(data: ArchiveOptions) -> None:
    """Raise UserError if shards are given to a study that stores images in several ways."""
    if made := [uri for uri in data.uris if shards.is_shards(uri)]:
        raise UserError(
            f"{made[0]}: expected an archive, whose images are prepared in several ways, got shards: use the archive "
            f"that they were made of"
        )


def begin(study: Study, networks: int) -> tuple[ArchiveOptions, str]:
    """Check the input, join or start the cluster, and show the plan for so many networks; the archive with the
    headers that were scanned, and the normalized `out`.

    Raises:
        UserError: a mistake in the input, or a cluster that cannot run the study.
    """
    if study.run.shard_reader == "ray":
        check_ray_reader(study.recipe)
    archive = study.data.with_headers(study.out)
    inputs = check_inputs(study.recipe, archive, study.out)
    connect(inputs.out, archive, study.run)
    options = TrainOptions(out=inputs.out, recipe=study.recipe, run=study.run, data=archive, members=networks)
    say_plan(options, inputs.images)
    return archive, inputs.out


# ---- Ground truth and scores


def check_tested(data: str) -> None:
    """Raise UserError if shards have no test images."""
    if not shards.read_info(data).rows("test"):
        raise UserError(
            f"{data}: expected images in the test split, got none: use an archive with more patients, or one whose "
            f"lists say which images are for testing"
        )


def known_test_labels(data: str) -> LabelTruth:
    """The labels of the test split of shards.

    Raises:
        UserError: there are no test images, or no finding has both classes among them.
    """
    check_tested(data)
    truth = known_labels(read_truth(data, ALL_IMAGES, "test", [schema.PATIENT_ID, schema.LABELS]))
    if not ensemble.with_both_classes(truth):
        raise UserError(
            f"{data}: expected a finding with positive and negative test images, got none: use an archive with more "
            f"labels or patients"
        )
    return truth


def held_out(data: str, recipe: Recipe, truth: str) -> HeldOut:
    """The ground truth of the test split of shards, or else of the val split, of which a note tells.

    Args:
        truth: what is needed, in words, such as "labels".

    Raises:
        UserError: neither has any, or only validation images have, which folds are trained on.
    """
    found = ensemble.held_out(data, recipe)
    if found is None:
        raise UserError(f"{data}: no test or validation image has {truth}: use an archive that has some")
    if found.split == "val" and recipe.folds:
        raise UserError(
            f"{data}: no test image has {truth}, and with folds, networks are trained on validation images: use an "
            f"archive with test images, or omit --folds"
        )
    if found.split == "val":
        console.note(
            f"no test image has {truth}: networks are compared on validation images, on which their best epochs were "
            f"selected"
        )
    return found


def labeled_images(data: str, recipe: Recipe) -> tuple[Split, LabelTruth]:
    """The labels of the test split of shards, or else of the val split; raises as `held_out` does."""
    found = held_out(data, recipe, "labels")
    assert isinstance(found.truth, LabelTruth)
    return found.split, found.truth


def scored_labels(
    trained: Sequence[Trained], data: Mapping[str, str], truth: LabelTruth, out: str
) -> dict[str, list[LabeledScores]]:
    """The scores of the test images by each recipe's networks, with labels; see `classifiers.joined`.

    Args:
        data: URI of each recipe's shards by its name; all have the same images.
        out: the folder of the study.
    """
    runs = {name: score_seeds(trained, name, uri, "test", out) for name, uri in data.items()}
    return classifiers.joined(runs, truth)


# ---- Results


def networks_record(trained: Sequence[Trained], recipes: Mapping[str, Recipe], data: str) -> dict[str, Any]:
    """For result.json: checkpoints by name and seed, the shards, and each recipe with its initial weights."""
    return {
        "checkpoints": {f"{network.name}, seed {network.seed}": network.checkpoint for network in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
    }


def images_in_words(images: LabeledScores, split: Split, seeds: int) -> str:
    """The images and networks of a study of classifiers, in a sentence."""
    patients = counted(len(set(images.patients.tolist())), "patient")
    findings = counted(len(images.findings), "finding")
    return f"{counted(len(images.rows), IMAGE[split])} of {patients}, {findings}, {counted(seeds, 'seed')}."


def write_classifiers(
    results: Sequence[SeedResults], title: str, images: LabeledScores, split: Split, seeds: int, out: str
) -> dict[str, Any]:
    """Print the table of classifiers; write table.md, results.csv and auroc.png into `out`; metrics and URIs."""
    text, summary = classifiers.table(results, title), images_in_words(images, split, seeds)
    print(f"{text}{summary}", flush=True)
    page, picture = f"{text}\n{summary}\n\n{classifiers.LEGEND}", classifiers.picture(results)
    files = write_files(out, page, ("results.csv", classifiers.csv(results)), ("auroc.png", picture))
    return {"metrics": {"images": float(len(images.rows)), **classifiers.metrics(results)}, **files}


def write_files(out: str, page: str, table: tuple[str, str], picture: tuple[str, Figure]) -> dict[str, Any]:
    """Write table.md, a table and a picture, each with its name, into `out`, and print the picture's URI; URIs for
    result.json."""
    storage.write_text(storage.join(out, "table.md"), page)
    (name, rows), (picture_name, figure) = table, picture
    storage.write_text(storage.join(out, name), rows)
    uri = figures.save_figure(figure, out, picture_name)
    print(f"picture: {uri}", flush=True)
    return {"table": storage.join(out, name), "pictures": [uri]}
