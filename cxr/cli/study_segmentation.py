"""The studies of pneumothorax and of lungs: U-Nets and fully convolutional networks compared on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from cxr.benchmarks.studies import segmentation, segmentation_report
from cxr.cli.ensembles import score_seeds
from cxr.cli.options import ArchiveOptions
from cxr.cli.study_networks import (
    Study,
    begin,
    check_names,
    check_options,
    check_tested,
    networks_record,
    write_files,
)
from cxr.cli.training_jobs import ensure_shards, resolve_environment
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.evaluation.ground_truth_masks import MaskTruth, known_masks
from cxr.evaluation.run import ReportOptions
from cxr.evaluation.segmentation_data import evaluate, load_scores
from cxr.families import checkpoint
from cxr.families.segmentation import SegmentationRecipe
from cxr.models.fcn import FCN_BACKBONES
from cxr.training.sweep import train_all
from cxr.wording import counted

# Settings in which each network's recipe differs from that of the job.
NETWORKS: dict[str, dict[str, Any]] = {
    "small_unet": {"architecture": "small_unet", "backbone_pretrained": "", "freeze_backbone": False},
    **{
        f"unet-{backbone}{suffix}": {"architecture": "unet", "backbone": backbone, "attention": attention}
        for backbone in ("resnet18", "resnet34")
        for suffix, attention in (("", "none"), ("-scse", "scse"))
    },
    **{
        f"{architecture}-{backbone}": {"architecture": architecture, "backbone": backbone}
        for backbone in FCN_BACKBONES
        for architecture in ("fcn32s", "fcn16s", "fcn8s")
    },
}


class SegmentationStudy(Study, Protocol):
    """Options of `cxr study pneumothorax` and of `cxr study lungs`."""

    @property
    def networks(self) -> tuple[str, ...]: ...

    @property
    def seeds(self) -> int: ...

    @property
    def recipe(self) -> SegmentationRecipe: ...


def run_study(
    options: SegmentationStudy, or_phantoms: Callable[[ArchiveOptions, str], ArchiveOptions] | None = None
) -> dict[str, Any]:
    """Train every network with every seed, score the test images with them, and compare the masks; returns the
    result.json.

    Args:
        or_phantoms: gives the archive, or phantoms in OUT if there is none. None: phantoms of any findings.

    Raises:
        UserError: no test image has a known mask, and other mistakes in the input.
    """
    recipe, run, seeds = options.recipe, options.run, options.seeds
    chosen = named(options.networks, recipe)
    check_options(options.data, seeds)
    archive, out = begin(options, len(chosen) * seeds)
    recipes = {name: resolve_environment(recipe, out, run) for name, recipe in chosen.items()}
    data = ensure_shards(or_phantoms(archive, out) if or_phantoms else archive, out, recipe)
    check_tested(data)
    truth = known_masks(data, ReportOptions(split="test"), recipe.mask_label)
    if not truth.known.any():
        raise UserError(
            f"{data}: none of the {len(truth.known)} images in its test split has a known mask of "
            f"{recipe.mask_label}: use an archive that has such masks, and more patients"
        )
    trained = train_all(recipes, range(seeds), data, out, run, reading=archive.reading)
    device = best_device()
    results = []
    for name in recipes:
        runs = score_seeds(trained, name, data, "test", out)
        evaluations = [evaluate(load_scores(of_seed), truth) for of_seed in runs]
        first = checkpoint.load(next(network.checkpoint for network in trained if network.name == name))
        results.append(segmentation.summarize(name, evaluations, first, device))
        print(f"evaluated: {name}, Dice {results[-1].dice.value:.3f}", flush=True)
    return {
        "metrics": {"images": float(truth.known.sum()), **segmentation.metrics(results)},
        **networks_record(trained, recipes, data),
        **write(results, truth, recipe, seeds, out, device),
    }


def named(names: Sequence[str], recipe: SegmentationRecipe) -> dict[str, SegmentationRecipe]:
    """The recipe of each of these networks, by name; all networks if none is named."""
    check_names("--networks", names, NETWORKS)
    return {name: recipe.replace(**NETWORKS[name]) for name in names or NETWORKS}


def write(
    results: Sequence[segmentation.SegmentationResult],
    truth: MaskTruth,
    recipe: SegmentationRecipe,
    seeds: int,
    out: str,
    device: torch.device,
) -> dict[str, Any]:
    """Print the table; write table.md, networks.csv and dice.png into `out`; their URIs."""
    patients = len(set(truth.patients[truth.known].tolist()))
    images = f"{counted(int(truth.known.sum()), 'test image')} of {counted(patients, 'patient')}"
    if not results[0].all_positive:
        images += f", {results[0].figures['positives']:.0f} with a mask of {truth.label.lower()}"
    summary = f"{images}, compared at {truth.resolution}; {counted(seeds, 'seed')}."
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of a CPU"
    timed = f"Forward passes are of one image of {recipe.size} px, {hardware}, float32, the median of several."
    print(f"{segmentation_report.table(results)}{summary}", flush=True)
    page = segmentation_report.page(results, truth.label, summary, timed, cut=not recipe.fully_connected)
    rows, picture = segmentation_report.csv(results), segmentation_report.picture(results)
    return write_files(out, page, ("networks.csv", rows), ("dice.png", picture))
