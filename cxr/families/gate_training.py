"""Trains the network of `cxr.data.gate` on phantoms and real frontal X-rays, and measures it.

Frontal images are rotated by 90, 180 or 270 degrees and inverted at random; lateral chests and other parts of the
body are phantoms. The package ships one such network, cxr/data/gate.safetensors; `cxr train gate` made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
from cxr import schema, storage
from cxr.augment.affine_exposure import random_affine, random_exposure, random_plates, random_shading
from cxr.data import gate
from cxr.data.decode import make_rows
from cxr.models.gate_network import GateNetwork
from cxr.models.spatial_transformer import warp
from cxr.phantom.archive import make_exam
from cxr.phantom.other_views import KINDS, LATERAL, render_other
from cxr.precision import in_float32
from cxr.runtime import console
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.options import ReadOptions

RENDERED_PX, STORED_PX = 160, 96  # phantoms are rendered larger and then reduced, as real images are
BATCH_SIZE, FRONTAL_IMAGES, PEAK_LR, WARMUP_STEPS = 64, 40, 2e-3, 50
HELD_OUT = 200  # phantoms of each kind that are not trained on
TURNS = (0, 90, 180, 270)  # degrees clockwise


@dataclass(frozen=True)
class GateTraining:
    """Settings of one training.

    Args:
        phantoms: number of frontal phantoms, and of phantoms of each kind that is not frontal.
        steps: number of steps with BATCH_SIZE images each.
    """

    phantoms: int = 1000
    steps: int = 3000
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """uint8 images (N, STORED_PX, STORED_PX) by what they show."""

    frontal: Tensor
    lateral: Tensor
    other: Tensor


def read_frontal(archive: str, split: str | None, source: str = "auto") -> Tensor:
    """The images of an archive, uint8 (N, STORED_PX, STORED_PX); those that cannot be used are left out.

    Args:
        split: one of `schema.SPLITS`, or None for all images.

    Raises:
        UserError: no such archive.
    """
    manifest = open_manifest(archive, ReadOptions(source=source)).table
    if split:
        manifest = manifest.filter([value == split for value in manifest[schema.SPLIT].to_pylist()])
    pixels = PixelFormat(STORED_PX)
    rows = make_rows(manifest, pixels)
    return torch.from_numpy(
        schema.pixels_array(rows.filter(rows[schema.ERROR].is_null())[schema.PIXELS], pixels).copy()
    )


def render_images(count: int, seed: int, first: int = 0) -> Images:
    """Phantoms: `count` frontal ones, `first` being the first one's index, and `count` of each other kind."""
    rng = np.random.default_rng([seed, first])
    frontal = [make_exam(first + index, size=RENDERED_PX, seed=seed).phantom.pixels for index in range(count)]
    others = {kind: [render_other(kind, rng, RENDERED_PX) for _ in range(count)] for kind in KINDS}
    lateral = others.pop(LATERAL)
    return Images(_stacked(frontal), _stacked(lateral), _stacked([image for of in others.values() for image in of]))


def _stacked(images: Sequence[np.ndarray]) -> Tensor:
    small = [cv2.resize(image, (STORED_PX, STORED_PX), interpolation=cv2.INTER_AREA) for image in images]
    return torch.from_numpy(np.stack(small))


def train(training: GateTraining, real: Sequence[Tensor]) -> GateNetwork:
    """A network trained on phantoms and real frontal images; half of the frontal images of a step are real ones.

    Args:
        real: one tensor from `read_frontal` per archive; empty to train on phantoms alone.
    """
    torch.manual_seed(training.seed)
    console.say(f"gate: rendering {training.phantoms * (1 + len(KINDS)):,} phantoms")
    phantoms = render_images(training.phantoms, training.seed)
    network = GateNetwork(gate.SIZE, len(gate.CLASSES) + 1).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=1e-3)
    schedule = LambdaLR(
        optimizer,
        lambda step: 0.5 * (1 + math.cos(math.pi * step / training.steps)) * min(1, (step + 1) / WARMUP_STEPS),
    )
    for step in range(1, training.steps + 1):
        images, classes = _sample(phantoms, torch.cat(list(real)) if real else None)
        inverted = torch.rand(len(images)) < 0.3
        x = _augmented(images, inverted)
        turns = torch.where(torch.rand(len(x)) < 0.4, 0, torch.randint(1, 4, (len(x),)))
        x = torch.stack([torch.rot90(image, -int(turn), (1, 2)) for image, turn in zip(x, turns, strict=True)])
        logits = network(_standardized(x))
        loss = F.cross_entropy(logits[:, :-1], torch.where(classes == 0, turns, classes))
        loss = loss + F.binary_cross_entropy_with_logits(logits[:, -1], inverted.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, training.steps // 10) == 0:
            console.say(f"gate: step {step}/{training.steps}, loss {loss.item():.3f}")
    return network.eval()


def _sample(phantoms: Images, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch (B, 1, H, W) in [0, 1], and its classes: 0 for frontal images, which are not rotated yet."""
    other_images = BATCH_SIZE - FRONTAL_IMAGES
    counts = {
        "real": FRONTAL_IMAGES // 2 if real is not None else 0,
        "lateral": other_images // 2,
        "other": other_images // 2,
    }
    chosen = [_draw(phantoms.frontal, FRONTAL_IMAGES - counts["real"])]
    chosen += [_draw(real, counts["real"])] if real is not None else []
    chosen += [_draw(phantoms.lateral, counts["lateral"]), _draw(phantoms.other, counts["other"])]
    classes = [0] * FRONTAL_IMAGES + [4] * counts["lateral"] + [5] * counts["other"]
    return torch.cat(chosen)[:, None].float() / 255, torch.tensor(classes)


def _draw(images: Tensor, count: int) -> Tensor:
    return images[torch.randint(len(images), (count,))]


@in_float32
def _augmented(x_B1HW: Tensor, inverted: Tensor) -> Tensor:
    """Images in random positions, exposures and collimations, some inverted, reduced to the gate's size.

    They are inverted before they are moved, and the space around a moved image is black or any gray, because
    otherwise the border would reveal which are inverted.
    """
    count = len(x_B1HW)
    x = torch.where(inverted[:, None, None, None], 1 - x_B1HW, x_B1HW)
    border = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    moved = border + warp(x - border, random_affine(count, rotation_deg=15, max_zoom=1.3, translate=0.12))
    x = torch.where(torch.rand(count, 1, 1, 1) < 0.4, x, moved)
    x = F.interpolate(x, (gate.SIZE, gate.SIZE), mode="bilinear", antialias=True)
    return random_plates(random_shading(random_exposure(x)))


def _standardized(x_B1HW: Tensor) -> Tensor:
    """`gate.standardize` for images in [0, 1]."""
    deviation, mean = torch.std_mean(255 * x_B1HW, (1, 2, 3), correction=0, keepdim=True)
    return (255 * x_B1HW - mean) / (deviation + 0.25)


def save_weights(network: GateNetwork, training: GateTraining, about: Mapping[str, object], uri: str) -> None:
    """Write the network as safetensors, whose metadata say how it was made."""
    provenance = {
        "description": "Distinguishes upright frontal chest X-rays from rotated, inverted and other images.",
        "training": json.dumps(asdict(training)),
        "about": json.dumps(dict(about)),
        "cxr_version": cxr.__version__,
        "torch_version": torch.__version__,
    }
    storage.write_bytes(uri, save(network.folded(), provenance))


def measure(images: Tensor, weights: Path | None = None) -> dict[str, float]:
    """Fraction of images that the gate passes as FRONTAL, by rotation and inversion: `upright`, `rotated_90`, …,
    `inverted`, `inverted_rotated_90`, …

    Args:
        images: uint8 (N, H, W), as they lie in the archive.
        weights: a file to use instead of the shipped one.
    """
    small = np.stack([gate.thumbnail(image) for image in images.numpy()])
    passed = {}
    for inverted in (False, True):
        for turn in TURNS:
            seen = np.rot90(255 - small if inverted else small, -turn // 90, (1, 2))
            names, _ = gate.verdicts(seen, weights or gate.WEIGHTS)
            name = "_".join([*(["inverted"] if inverted else []), *([f"rotated_{turn}"] if turn else [])])
            passed[name or "upright"] = float(np.mean([verdict == gate.FRONTAL for verdict in names]))
    return passed
