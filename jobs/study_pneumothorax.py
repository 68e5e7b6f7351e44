"""U-Nets and fully convolutional networks that find pneumothorax, side by side: Dice, speed, size, receptive field.

python jobs/study_pneumothorax.py --networks unet-resnet18 fcn8s-resnet18  # two of them, on a phantom archive

ray job submit --working-dir . -- python jobs/study_pneumothorax.py --archive s3://xrays/siim \\
    --out s3://xrays/study --size 512 --stored-size 512 --epochs 20 --fully-connected --seeds 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cxr import storage
from cxr.benchmarks.studies import segmentation, segmentation_report
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import siim_phantoms
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment, training_record
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.models.fcn import FCN_BACKBONES
from cxr.reporting import figures
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all

# Name -> the settings in which its recipe differs from the job's.
NETWORKS: dict[str, dict[str, str]] = {
    "small_unet": {"architecture": "small_unet", "backbone_pretrained": ""},
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_pneumothorax"
    """Folder or URI of the results: table.md, networks.csv, dice.png, and a folder for each network."""
    networks: tuple[str, ...] = ()
    """Networks to compare: small_unet, unet-BACKBONE, unet-BACKBONE-scse (resnet18, resnet34), fcn32s-BACKBONE, fcn16s-BACKBONE,
    fcn8s-BACKBONE (alexnet, vgg16, googlenet, resnet18, resnet34, resnet50). Default: all of them."""
    seeds: int = 1
    """Number of networks per kind, each with its own seed."""
    test_images: int = 0
    """Number of test images, spread evenly over the split, on which networks are compared; they are held in memory.
    0: all."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: PneumothoraxRecipe = field(
        default_factory=lambda: PneumothoraxRecipe(size=128, epochs=8, fully_connected=False)
    )
    """Settings of all networks, except those in their names: architecture, backbone, attention."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    chosen = named(options.networks, options.recipe)
    if options.data.stream:
        raise UserError("networks are judged on shards, and all of them read the same: leave --stream out")
    out = check_inputs(options.recipe, options.data, options.out)
    connect(out, options.data, options.run)
    recipes = {name: resolve_environment(recipe, out, options.run) for name, recipe in chosen.items()}
    data = ensure_shards(siim_phantoms(options.data, out), out, options.recipe)
    test = segmentation.read(data, "test", options.recipe.mask_label, options.test_images)  # first: it may hold none
    trained = train_all(recipes, range(options.seeds), data, out, options.run)
    device = best_device()
    judged = []
    for name in recipes:
        networks = [checkpoint.load(one.checkpoint) for one in trained if one.name == name]
        judged.append(segmentation.judge(name, networks, test, device))
        print(f"judged: {name}, Dice {judged[-1].dice.value:.3f}", flush=True)
    return {
        "metrics": {"images": float(len(test.pixels)), **segmentation.metrics(judged)},
        "checkpoints": {f"{one.name}, seed {one.seed}": one.checkpoint for one in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
        **write(judged, test, options, out, device),
    }


def named(names: Sequence[str], recipe: PneumothoraxRecipe) -> dict[str, PneumothoraxRecipe]:
    """Name -> recipe of each network asked for; all where none is named."""
    if unknown := set(names) - set(NETWORKS):
        raise UserError(f"networks: expected some of {', '.join(NETWORKS)}, got {' '.join(sorted(unknown))}")
    return {name: recipe.replace(**NETWORKS[name]) for name in names or NETWORKS}


def write(
    judged: Sequence[segmentation.Judged],
    test: segmentation.MaskedXRays,
    options: Options,
    out: str,
    device: torch.device,
) -> dict[str, Any]:
    """Print the table; write table.md, networks.csv and dice.png into `out`; their URIs."""
    patients, recipe = len(set(test.patients)), options.recipe
    said = (
        f"{len(test.pixels):,} test images of {patients:,} patients, {judged[0].figures['positives']:.0f} with a "
        f"pneumothorax, compared at {test.size} px; {options.seeds} seed{'s' * (options.seeds > 1)}."
    )
    with_what = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of a CPU"
    timed = f"Forward passes are of one image of {recipe.size} px, {with_what}, float32, the median of several."
    print(f"{segmentation_report.table(judged)}{said}", flush=True)
    page = segmentation_report.page(judged, said, timed, cut=not recipe.fully_connected)
    storage.write_text(storage.join(out, "table.md"), page)
    storage.write_text(storage.join(out, "networks.csv"), segmentation_report.csv(judged))
    picture = figures.save_figure(segmentation_report.picture(judged), out, "dice.png")
    print(f"picture: {picture}", flush=True)
    return {"table": storage.join(out, "networks.csv"), "pictures": [picture]}


if __name__ == "__main__":
    run_job(main, Options)
