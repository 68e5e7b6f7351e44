"""Train the lung network that ships with cxr (on phantoms only), and evaluate it on archives with lung masks.

The shipped file, cxr/models/phantom_lungs.safetensors, was made by the first command; no image of a patient was used.

cxr train phantom-lungs --out runs/phantom_lungs

cxr train phantom-lungs --steps 0 --archive /data/montgomery --archive /data/shenzhen

The last command evaluates the network that ships with cxr.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cxr import storage
from cxr.errors import UserError

if TYPE_CHECKING:
    from cxr.models.small_unet import LungField


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/phantom_lungs"
    """Folder or URI of the results; the weights are OUT/phantom_lungs.safetensors."""
    sizes: tuple[int, ...] = (64, 96, 128, 160)
    """Heights and widths of the training images in pixels; each step uses one of them at random."""
    phantoms: int = 1500
    """Number of training images."""
    steps: int = 2500
    """Number of training steps, with 16 images each. 0: evaluate the network that ships with cxr instead."""
    seed: int = 0
    """Seed of the phantoms, the initial weights and the augmentation."""
    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or URI of an archive with lung masks on which to evaluate the network. May be repeated."""
    half: Literal["all", "development", "test"] = "all"
    """Evaluate only on the images of one half of the patients; see `cxr benchmark align`."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 32 or self.phantoms < 1 or self.steps < 0:
            raise UserError(
                f"expected sizes of at least 32, at least 1 phantom and no negative steps, got sizes={self.sizes}, "
                f"phantoms={self.phantoms}, steps={self.steps}"
            )
        if self.half != "all" and not self.archive:
            raise UserError("expected --archive with --half, got none: add it")


def main(options: Options) -> dict[str, Any]:
    from cxr.data.batch import best_device  # these import torch, which takes seconds
    from cxr.families import lung_pretraining
    from cxr.models.small_unet import LARGEST_PX

    out = storage.normalize(options.out)
    if options.steps and max(options.sizes) > LARGEST_PX:
        raise UserError(
            f"--sizes: expected at most {LARGEST_PX} px, got {max(options.sizes)}: larger images are reduced to "
            f"{LARGEST_PX} px before the network sees them, so omit it"
        )
    training = lung_pretraining.LungTraining(options.sizes, options.phantoms, options.steps, options.seed)
    if options.steps:
        network, metrics = lung_pretraining.train(training, best_device())
        network, weights = network.cpu(), storage.join(out, "phantom_lungs.safetensors")
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        lung_pretraining.save_weights(network, training, metrics, weights, command)
    else:
        network, metrics = lung_pretraining.load_network(lung_pretraining.SHIPPED), {}
        weights = str(lung_pretraining.SHIPPED_FILE)
    print(f"weights: {weights}", flush=True)
    return {"weights": weights, "metrics": metrics | _measure(network, options)}


def _measure(network: LungField, options: Options) -> dict[str, float]:
    """Mean dice and iou on held-out phantoms and on the archives, as dice_SOURCE_SIZEpx, at every size."""
    import torch

    from cxr.benchmarks.studies import align
    from cxr.families import lung_pretraining

    metrics: dict[str, float] = {}
    for size in options.sizes:
        phantoms = lung_pretraining.render_phantoms(lung_pretraining.HELD_OUT, size, options.seed + 1)
        measured = {"phantoms": phantoms.split(1, 1)}
        for archive in options.archive:
            images, notes = align.read([archive], size, half=options.half)
            for note in notes:
                print(f"note: {note}", flush=True)
            measured[images.sources[0]] = images.pixels[:, None], 255 * images.masks[:, None].to(torch.uint8)
        for source, (images_B1HW, lungs_B1HW) in measured.items():
            result = lung_pretraining.evaluate(network, images_B1HW, lungs_B1HW)
            metrics |= {f"{name}_{source}_{size}px": value for name, value in result.items()}
            print(
                f"{source}, {size} px, {len(images_B1HW)} images: Dice {result['dice']:.3f}, IoU {result['iou']:.3f}",
                flush=True,
            )
    return metrics
