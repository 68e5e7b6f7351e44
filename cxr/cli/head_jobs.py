"""Training and searching the head of a classifier on stored embeddings: what jobs do with `--embeddings`. No Ray."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from cxr import schema, storage
from cxr.cli.inputs import open_archive
from cxr.cli.options import ArchiveOptions
from cxr.data import embeddings, shard_index, shards
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files, recipe_from_dict
from cxr.families.checkpoint import Checkpoint
from cxr.families.classifier_base import ClassifierTask
from cxr.families.classify import ClassifyRecipe
from cxr.families.compatibility import RawArchive
from cxr.families.ensemble import EnsembleTask, check_crops
from cxr.families.fused_features import FusedFeaturesRecipe, fuse
from cxr.families.head_training import (
    LabeledEmbeddings,
    attach,
    check_settings,
    search_heads,
    search_space,
    starting_recipe,
    train_head,
)
from cxr.families.presets import RECIPE_FILE
from cxr.reporting.trials import Trial, trials_table, write_search_pictures, write_trials
from cxr.runtime import console
from cxr.training.options import SearchOptions

CHECKPOINT = "checkpoint"  # folder in OUT
SHOWN = 10  # trials in the printed table; trials.csv has all


def head_recipe(runs: Sequence[str]) -> ClassifyRecipe:
    """The default settings of a head on the embeddings of scoring runs. Settings of images are those of the first
    network.

    Raises:
        UserError: there are no embeddings, or a network is no classifier.
    """
    first = _folders(runs)[0]
    return starting_recipe(_base_recipe(first, embeddings.read_about(first)))


def train_head_job(recipe: ClassifyRecipe, runs: Sequence[str], archive: ArchiveOptions, out: str) -> dict[str, Any]:
    """The body of `cxr train classify --embeddings`; returns its result.json."""
    prepared = _prepared(recipe, runs, archive, out)
    start = time.monotonic()
    head = train_head(recipe, prepared.data)
    console.say(f"trained the head for {recipe.epochs} epochs in {time.monotonic() - start:.1f} s")
    return _saved(recipe, prepared, archive, head)


def tune_head_job(
    recipe: ClassifyRecipe, runs: Sequence[str], archive: ArchiveOptions, options: SearchOptions, out: str
) -> dict[str, Any]:
    """The body of `cxr tune classify --embeddings`; returns its result.json."""
    space = search_space(recipe)
    if unknown := set(options.frozen_params) - set(space):
        raise UserError(
            f"frozen_params={' '.join(sorted(unknown))}: expected settings that a search of heads samples, which are "
            f"{', '.join(space)}"
        )
    if options.objectives not in ((), (recipe.monitor,)):
        raise UserError(
            f"objectives={' '.join(options.objectives)}: expected none with --embeddings, which optimizes "
            f"{recipe.monitor}: omit --objectives"
        )
    space = {name: values for name, values in space.items() if name not in options.frozen_params}
    if not space:
        raise UserError("frozen_params leaves no setting to search: remove some of them from --frozen-params")
    prepared = _prepared(recipe, runs, archive, out)
    start = time.monotonic()
    found = search_heads(
        recipe,
        prepared.data,
        space,
        trials=options.trials,
        seed=options.search_seed,
        threads=options.max_concurrent_trials,
    )
    seconds = time.monotonic() - start
    console.say(f"searched {len(found)} trials in {seconds:.1f} s")
    epochs_of = recipe.batch_size / len(prepared.data.train)
    trials = [
        Trial(
            str(trial.number),
            "stopped early" if trial.stopped_early else "done",
            max(1, round(trial.steps * epochs_of)),
            trial.value,
            trial.sampled,
            {},
            "",
        )
        for trial in found
    ]
    table = write_trials(trials, recipe.monitor, prepared.out)
    print(trials_table(trials[:SHOWN], recipe.monitor), flush=True)
    best = recipe.replace(**found[0].sampled)
    pictures = write_search_pictures(trials, space, recipe.monitor, True, prepared.out)
    result = _saved(best, prepared, archive, train_head(best, prepared.data))
    return {**result, "sampled": found[0].sampled, "trials": table, "search_seconds": seconds, "pictures": pictures}


@dataclass(frozen=True)
class _Prepared:
    """What a job needs, read once: the URIs of OUT, of the folders with embeddings and of the checkpoints that made
    them, the archives with the labels, the data on the device, and the findings."""

    out: str
    folders: tuple[str, ...]
    bases: tuple[str, ...]
    archives: tuple[str, ...]
    data: LabeledEmbeddings
    findings: tuple[str, ...]


def _folders(runs: Sequence[str]) -> list[str]:
    """The folders with embeddings of scoring runs, each once."""
    folders = embeddings.folders([storage.normalize(run) for run in runs])
    if len(set(folders)) < len(folders):
        raise UserError(f"expected different folders of embeddings, got {' and '.join(folders)}: use each once")
    return folders


def _base_recipe(run: str, about: Mapping[str, Any]) -> ClassifyRecipe:
    """The recipe of the network that made the embeddings of a run; `about` is their embeddings.json."""
    base = checkpoint_files.read_about(about["checkpoint"])
    if base["sha256"] != about["sha256"]:
        raise UserError(
            f"{about['checkpoint']} has other weights than the network that made the embeddings in {run}: restore "
            f"it, or score again"
        )
    recipe = recipe_from_dict(base["recipe"])
    if not isinstance(recipe, ClassifyRecipe):
        raise UserError(
            f"expected embeddings of family classify in {run}, got those of {recipe.family}: score with a checkpoint "
            f"of family classify"
        )
    return recipe


def _prepared(recipe: ClassifyRecipe, runs: Sequence[str], archive: ArchiveOptions, out: str) -> _Prepared:
    """Check the options, and read embeddings and labels."""
    out, folders = storage.normalize(out), _folders(runs)
    if storage.exists(storage.join(out, CHECKPOINT, checkpoint_files.ABOUT)):
        raise UserError(f"{out} already contains a run: use another --out")
    abouts = [embeddings.read_about(folder) for folder in folders]
    bases = [_base_recipe(folder, about) for folder, about in zip(folders, abouts, strict=True)]
    check_settings(recipe, bases[0])
    if len(bases) > 1:
        _ = FusedFeaturesRecipe.of(bases, recipe.head)  # raises if they cannot be fused
    archives = tuple(archive.uris or abouts[0]["archives"])
    ids, splits, labels_NF, findings = _labels(archive, archives, out)
    start = time.monotonic()
    stored = embeddings.load_together(folders)
    rows = pc.index_in(ids, value_set=stored.image_ids)
    known_N = rows.is_valid().to_numpy(zero_copy_only=False)
    if not known_N.all():
        console.note(f"{(~known_N).sum()} of {len(ids)} labeled images have no embedding and are not used")
    at_N = rows.fill_null(0).to_numpy(zero_copy_only=False)
    everywhere_NF = np.full((len(stored.image_ids), len(findings)), schema.UNKNOWN, np.int8)
    everywhere_NF[at_N[known_N]] = labels_NF[known_N]
    parts = {}
    for split in ("train", "val"):
        chosen_N = known_N & pc.equal(splits, split).to_numpy(zero_copy_only=False)
        parts[split] = torch.from_numpy(at_N[chosen_N].astype(np.int64))
        if not chosen_N.any():
            raise UserError(
                f"expected images with embeddings in the splits train and val, got none in {split}: score all splits "
                f"of the archive, or use an archive whose images were scored"
            )
    data = LabeledEmbeddings(torch.from_numpy(stored.vectors), torch.from_numpy(everywhere_NF), **parts)
    console.say(
        f"read {len(data.train)} embeddings to train on and {len(data.val)} to validate on, each of "
        f"{data.vectors.shape[1]} numbers, in {time.monotonic() - start:.1f} s"
    )
    checkpoints = tuple(about["checkpoint"] for about in abouts)
    return _Prepared(out, tuple(folders), checkpoints, archives, data.to(best_device()), findings)


def _labels(
    options: ArchiveOptions, archives: Sequence[str], out: str
) -> tuple[pa.ChunkedArray, pa.ChunkedArray, np.ndarray, tuple[str, ...]]:
    """Ids, splits and labels (N, F) of all images of the archives, and the findings: those of any archive."""
    options = options.with_headers(out)
    opened = [open_archive(options, uri) for uri in archives]
    findings = tuple(dict.fromkeys(finding for each in opened for finding in each.findings))
    columns = [schema.IMAGE_ID, schema.SPLIT, schema.LABELS]
    tables = []
    for each in opened:
        if isinstance(each, RawArchive):
            tables.append((each.manifest.table.select(columns), each.findings))
        else:
            files = [file for split in each.parts.values() for file in split]
            tables += [(storage.read_parquet(file.uri, columns=columns), file.findings) for file in files]
    ids, splits = (
        pa.chunked_array([chunk for table, _ in tables for chunk in table[name].chunks], pa.string())
        for name in columns[:2]
    )
    shard_index.check_unique([ids], " and ".join(archives))
    labels_NF = np.concatenate([shards.aligned_labels(table[schema.LABELS], own, findings) for table, own in tables])
    return ids, splits, labels_NF, findings


def _task(
    recipe: ClassifyRecipe, bases: Sequence[Checkpoint], findings: tuple[str, ...], head: nn.Module
) -> ClassifierTask | EnsembleTask:
    """The network with a trained head on the backbone that made the embeddings, or on several, as a task."""
    if len(bases) == 1:
        return recipe.task(attach(bases[0].network, recipe, findings, head))
    check_crops(bases)
    fused = FusedFeaturesRecipe.of([base.recipe for base in bases], recipe.head)
    return fused.task(fuse([base.network for base in bases], fused, findings, head))


def _saved(recipe: ClassifyRecipe, prepared: _Prepared, archive: ArchiveOptions, head: nn.Module) -> dict[str, Any]:
    """Write the checkpoint of the whole network in OUT/checkpoint, with its thresholds; the result.json."""
    out, data, findings = prepared.out, prepared.data, prepared.findings
    bases = [checkpoint.load(uri) for uri in prepared.bases]
    task = _task(recipe, bases, findings, head)
    network, device = task.network, data.vectors.device
    with torch.inference_mode():
        head = head.to(device)
        p_NF = torch.cat([head(data.vectors[rows].float()).sigmoid() for rows in data.val.split(65_536)])
        if not p_NF.isfinite().all():
            raise UserError("expected probabilities, got values that are not finite: lower --lr")
        network.cpu()
        evaluation = task if isinstance(task, ClassifierTask) else task.evaluation
        metrics = evaluation.evaluate_labels(torch.cat([p_NF, data.labels[data.val].float()], 1).cpu())
    if not np.isfinite(metrics[recipe.monitor]):
        raise UserError(
            "expected a finding with positive and negative labels among the validation images, got none: use "
            "--archive or --labels with labels of these images"
        )
    target = storage.join(out, CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        reading = archive.reading.describe()
        checkpoint.save(
            Path(folder),
            task.recipe,
            task,
            network.state_dict(),
            findings=findings,
            metrics=metrics,
            reading=reading,
            origin=bases[0].about.get("origin") if len(bases) == 1 else None,
        )
        storage.upload_folder(Path(folder), target)
    if cropping := checkpoint_files.crop_checkpoint_of(bases[0].uri, recipe.crop_checkpoint):
        checkpoint_files.copy_for_scoring(cropping, storage.join(target, checkpoint_files.CROP))
    storage.write_json(storage.join(out, RECIPE_FILE), recipe.to_dict())
    print("  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    print(f"checkpoint: {target}", flush=True)
    return {
        "checkpoint": target,
        "metrics": metrics,
        "epochs": recipe.epochs,
        "embeddings": list(prepared.folders),
        "data": list(prepared.archives),
        "recipe": recipe.to_dict(),
        "initial_weights": {},
    }
