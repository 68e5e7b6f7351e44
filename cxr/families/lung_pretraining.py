"""Trains a network that finds the lung fields on phantoms, whose lungs are known, so that no real mask is needed.

The package ships one such network, cxr/models/phantom_lungs.safetensors; `cxr train phantom-lungs` made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import cxr
from cxr import models, storage
from cxr.augment.affine_exposure import random_affine, random_exposure, random_plates, random_shading
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.metrics import segmentation
from cxr.models import pretrained
from cxr.models.backbones import normalize_contrast
from cxr.models.pretrained import Fit
from cxr.models.small_unet import LungField, soft_dice
from cxr.models.spatial_transformer import warp
from cxr.phantom.archive import make_exam
from cxr.precision import in_float32
from cxr.runtime import console
from cxr.schema import LUNGS

SHIPPED = "phantoms"  # names the network in the package
SHIPPED_FILE = Path(models.__file__).with_name("phantom_lungs.safetensors")
HELD_OUT = 64  # phantoms that are not trained on
BATCH_SIZE, PEAK_LR, WARMUP_STEPS = 16, 2e-3, 30
OVERSAMPLING = 1.5  # phantoms are rendered this much larger and then reduced, as real images are
PROGRESS_LINES = 5
MIN_DICE = 0.8  # below it, training has failed


@dataclass(frozen=True)
class LungTraining:
    """Settings of one training.

    Args:
        sizes: heights and widths of the images in pixels; each step uses one of them at random.
        phantoms: number of training images.
        steps: number of steps with `BATCH_SIZE` images each.
    """

    sizes: tuple[int, ...]
    phantoms: int
    steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"{sizes}px-{self.phantoms}phantoms-{self.steps}steps-seed{self.seed}"


def pretrain(training: LungTraining, folder: str) -> str:
    """URI of the trained network's weights in `folder`; trains unless an earlier call has.

    Raises:
        UserError: the Dice on held-out phantoms is below `MIN_DICE`.
    """
    uri = storage.join(folder, f"{training.name}.safetensors")
    if not storage.exists(uri):
        network, metrics = train(training, best_device())
        if metrics["dice"] < MIN_DICE:
            raise UserError(
                f"the lung network reached a Dice of only {metrics['dice']:.3f} on held-out phantoms, expected at "
                f"least {MIN_DICE}; raise lung_steps"
            )
        save_weights(network, training, metrics, uri)
    return uri


def save_weights(
    network: LungField, training: LungTraining, metrics: Mapping[str, float], uri: str, command: str = ""
) -> None:
    """Write the network as safetensors, whose metadata say how it was made; `command` is the command line."""
    provenance = {
        "description": "Lung fields in frontal chest X-rays, trained on phantoms only (no patient data).",
        "training": json.dumps(asdict(training)),
        "held_out_phantoms": json.dumps(dict(metrics)),
        "command": command,
        "cxr_version": cxr.__version__,
        "torch_version": torch.__version__,
    }
    state = {name: values.detach().cpu().contiguous() for name, values in network.state_dict().items()}
    storage.write_bytes(uri, save(state, provenance))


def load_weights(source: str) -> dict[str, Tensor]:
    """The lung network's weights from `source`: SHIPPED, or the path or URI of a state dict that contains them.

    Raises:
        UserError: `source` is neither, or cannot be read as weights.
        ValueError: the state dict contains no lung network.
    """
    if source == SHIPPED:
        return dict(match_weights(pretrained.from_uri(str(SHIPPED_FILE))).state)
    if not pretrained.is_uri(source):
        raise UserError(f"expected {SHIPPED}, or a path or URI of lung weights, got {source!r}")
    return dict(match_weights(pretrained.from_uri(source)).state)


def load_network(source: str) -> LungField:
    """The frozen lung network with the weights of `load_weights`, on the CPU."""
    network = LungField()
    network.load_state_dict(load_weights(source))
    return network.requires_grad_(False).eval()


def match_weights(state: Mapping[str, Tensor]) -> Fit:
    """The lung network's part of a state dict, which may be that of a larger network, such as an aligner's.

    Raises:
        ValueError: the state dict contains no lung network.
    """
    return pretrained.match(LungField().state_dict(), state, "a lung network")


def train(training: LungTraining, device: torch.device) -> tuple[LungField, dict[str, float]]:
    """A trained network, and its mean dice and iou on held-out phantoms of the largest size."""
    torch.manual_seed(training.seed)
    console.say(f"lung network: rendering {training.phantoms} phantoms")
    phantoms = render_phantoms(HELD_OUT + training.phantoms, max(training.sizes), training.seed)
    held_out, phantoms = phantoms[:HELD_OUT].to(device), phantoms[HELD_OUT:].to(device)
    network = LungField().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=1e-4)
    schedule = LambdaLR(
        optimizer,
        lambda step: 0.5 * (1 + math.cos(math.pi * step / training.steps)) * min(1, step / WARMUP_STEPS),
    )
    for step in range(1, training.steps + 1):
        chosen = torch.randint(len(phantoms), (BATCH_SIZE,)).to(device, non_blocking=True)
        size = training.sizes[int(torch.randint(len(training.sizes), ()))]
        loss = _loss(network, *_augmented(phantoms[chosen], size))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, training.steps // PROGRESS_LINES) == 0:
            console.say(f"lung network: step {step}/{training.steps}, loss {loss.item():.3f}")
    metrics = evaluate(network.eval(), *held_out.split(1, 1))
    console.say(f"lung network: Dice {metrics['dice']:.3f}, IoU {metrics['iou']:.3f} on {HELD_OUT} held-out phantoms")
    return network, metrics


def render_phantoms(count: int, size: int, seed: int) -> Tensor:
    """Phantoms and their lung fields, (count, 2, size, size) uint8; in the second channel, 255 is lung."""
    rendered = np.empty((count, 2, size, size), np.uint8)
    for index in range(count):
        phantom = make_exam(index, size=round(OVERSAMPLING * size), seed=seed).phantom
        for channel, image in enumerate((phantom.pixels, 255 * phantom.masks[LUNGS].astype(np.uint8))):
            rendered[index, channel] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(rendered)


@torch.no_grad()
def evaluate(network: LungField, images_B1HW: Tensor, lungs_B1HW: Tensor) -> dict[str, float]:
    """Mean dice and iou over images of lung fields thresholded at one half.

    Args:
        images_B1HW: uint8 images.
        lungs_B1HW: uint8 masks; from 128 on is lung.
    """
    rows = []
    for image, lungs in zip(images_B1HW.split(BATCH_SIZE), lungs_B1HW.split(BATCH_SIZE), strict=True):
        predicted = network(normalize_contrast(image.float() / 255)) > 0.5
        rows.append(segmentation.overlap_rows(predicted, lungs >= 128))
    overlap = torch.cat(rows)
    return {
        "dice": float(segmentation.dice(overlap).mean()),
        "iou": float(segmentation.iou(overlap).mean()),
    }


@in_float32
def _augmented(phantoms_B2HW: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images and lung fields (B, 1, size, size) in [0, 1] in random positions, exposures and collimations."""
    warps = random_affine(
        len(phantoms_B2HW), rotation_deg=15, max_zoom=1.3, translate=0.1, device=phantoms_B2HW.device
    )
    warped = warp(phantoms_B2HW.float() / 255, warps)
    if warped.shape[-1] != size:
        warped = F.interpolate(warped, (size, size), mode="bilinear", antialias=True)
    x, lungs = warped.split(1, 1)
    return random_plates(random_shading(random_exposure(x))), lungs


def _loss(network: LungField, x: Tensor, lungs: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        logits = network.logits(normalize_contrast(x)).float()
    return F.binary_cross_entropy_with_logits(logits, lungs) + (1 - soft_dice(logits.sigmoid(), lungs)).mean()
