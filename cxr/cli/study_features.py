"""The study of feature-level fusion: backbones alone, the mean of their probabilities, a head on all features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cxr import storage
from cxr.benchmarks.studies import classifiers
from cxr.cli.ensembles import score_all
from cxr.cli.head_jobs import CHECKPOINT, head_recipe, train_head_job
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import (
    begin,
    check_different,
    check_options,
    labeled_images,
    networks_record,
    write_classifiers,
)
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.errors import UserError
from cxr.evaluation.run import Run, Split
from cxr.families import checkpoint_files
from cxr.models.image_classifier import POOLED_HEADS
from cxr.training.sweep import Trained, train_all

if TYPE_CHECKING:
    from cxr.cli.commands.study_features import Options

ENSEMBLE, FUSED = "mean of probabilities", "fused features"
HEAD = {"epochs": 40, "batch_size": 64}  # of the head on all features; few images need small batches


def run_study(options: Options) -> dict[str, Any]:
    """Train a classifier on each backbone with every seed, and a head on the features of all of them; score the test
    images with them, and compare the probabilities; returns the result.json.

    Raises:
        UserError: no test or validation image has labels, and other mistakes in the input.
    """
    recipe, run, backbones, seeds = options.recipe, options.run, options.backbones, options.seeds
    if len(backbones) < 2:
        raise UserError(f"--backbones: expected 2 or more, got {' '.join(backbones) or 'none'}: add another")
    check_different("--backbones", backbones)
    if recipe.head not in POOLED_HEADS:
        heads = " or ".join(POOLED_HEADS)
        raise UserError(f"--head: expected {heads}, whose features can be fused, got {recipe.head}: use one of them")
    check_options(options.data, seeds)
    archive, out = begin(options, seeds * len(backbones))
    recipes = {name: resolve_environment(recipe.replace(backbone=name), out, run) for name in backbones}
    named = {_folder(name): of for name, of in recipes.items()}
    data = ensure_shards(phantoms_with_boxes(archive, out), out, recipe)
    split, truth = labeled_images(data, recipe)
    trained = train_all(named, range(seeds), data, out, run, reading=archive.reading)
    runs: dict[str, list[Run]] = {name: [] for name in (*named, FUSED)}
    for seed in range(seeds):
        folder = storage.join(out, "-".join(("fused", *named)), f"seed-{seed}")
        for name, of in _scored(trained, seed, data, split, folder).items():
            runs[name].append(of)
    scores = classifiers.joined(runs, truth)
    alone = [scores[name] for name in named]
    means = [classifiers.averaged(of_seed) for of_seed in zip(*alone, strict=True)]
    results = [
        classifiers.result(ENSEMBLE, means),
        classifiers.result(FUSED, scores[FUSED]),
        *(classifiers.result(f"{name} alone", of) for name, of in zip(backbones, alone, strict=True)),
    ]
    written = write_classifiers(results, "classifier", means[0], split, seeds, out)
    return {**networks_record(trained, named, data), **written}


def _folder(backbone: str) -> str:
    """A backbone's name as that of a folder and of a member of a panel."""
    return backbone.replace(":", "-").replace(".", "-")


def _scored(trained: Sequence[Trained], seed: int, data: str, split: Split, out: str) -> dict[str, Run]:
    """The runs of the backbones of a seed, and of the head that is trained on their features."""
    own = {network.name: network.checkpoint for network in trained if network.seed == seed}
    embedded = storage.join(out, "embedded")
    alone = score_all(own, data, "all", embedded, save_embeddings=True)
    head = storage.join(out, "head")
    if not storage.exists(storage.join(head, CHECKPOINT, checkpoint_files.ABOUT)):
        recipe = head_recipe([embedded]).replace(**HEAD)
        train_head_job(recipe, [embedded], ArchiveOptions(archive=(data,)), head)
    (fused,) = score_all({"fused": storage.join(head, CHECKPOINT)}, data, split, storage.join(out, "scored")).values()
    return {FUSED: fused, **alone}
