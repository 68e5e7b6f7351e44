"""Teaching a network to find lungs by phantoms alone, whose lung fields are known; no real mask is needed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from cxr import storage
from cxr.augment.affine_exposure import random_affine, random_exposure, random_plates, random_shading
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.models.backbones import normalise_contrast
from cxr.models.small_unet import LungField, soft_dice
from cxr.models.spatial_transformer import warp
from cxr.models.state_dicts import matching
from cxr.phantom.archive import make_exam
from cxr.precision import in_float32
from cxr.schema import LUNGS

WEIGHTS, ABOUT = "weights.pt", "about.json"
UNSEEN = 64  # phantoms kept for judging
BATCH, LR, WARMUP = 16, 2e-3, 30
FINER = 1.5  # phantoms are drawn this much larger, then made smaller as real images are
TOLD = 5  # lines of progress


@dataclass(frozen=True)
class Lesson:
    """How a lung network is taught: pixels to a side, phantoms drawn, steps of 16 images, seed."""

    size: int
    phantoms: int
    steps: int
    seed: int


def kept(lesson: Lesson, parent: str) -> str:
    """URI of a folder in `parent` with the weights that `lesson` gives; taught unless that has been done before.

    Raises:
        UserError: its Dice on unseen phantoms stayed below .8.
    """
    folder = storage.join(parent, f"{lesson.size}px-{lesson.phantoms}-{lesson.steps}-seed{lesson.seed}")
    about = storage.join(folder, ABOUT)  # written last
    if storage.exists(about):
        return folder
    device = best_device()
    network, dice = taught(lesson, device)
    if dice < 0.8:
        raise UserError(f"the lung network reached a Dice of only {dice:.3f} on phantoms: give more lung_steps")
    data = io.BytesIO()
    torch.save(network.cpu().state_dict(), data)
    storage.write_bytes(storage.join(folder, WEIGHTS), data.getvalue())
    storage.write_json(about, {"lesson": asdict(lesson), "dice_on_unseen_phantoms": dice})
    return folder


def matched(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A lung network's weights: those that `kept` wrote, or those of the lung network within an aligner.

    Raises:
        ValueError: there is no lung network's among these.
    """
    return matching(LungField().state_dict(), state, "a lung network")


def taught(lesson: Lesson, device: torch.device) -> tuple[LungField, float]:
    """A lung network and its mean Dice on phantoms that it has not seen."""
    torch.manual_seed(lesson.seed)
    print(f"lung network: drawing {lesson.phantoms} phantoms", flush=True)
    chests = draw_chests(lesson.phantoms + UNSEEN, lesson.size, lesson.seed)
    unseen, chests = chests[:UNSEEN].to(device), chests[UNSEEN:].to(device)
    network = LungField().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-4)
    schedule = LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / lesson.steps)) * min(1, step / WARMUP)
    )
    for step in range(1, lesson.steps + 1):
        chosen = torch.randint(len(chests), (BATCH,)).to(device, non_blocking=True)
        loss = _loss(network, *_varied(chests[chosen]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, lesson.steps // TOLD) == 0:
            print(f"lung network: step {step}/{lesson.steps}, loss {loss.item():.3f}", flush=True)
    dice = judged(network.eval(), unseen)
    print(f"lung network: Dice {dice:.3f} on {UNSEEN} phantoms it has not seen", flush=True)
    return network, dice


def draw_chests(count: int, size: int, seed: int) -> Tensor:
    """Phantoms and their lung fields, (count, 2, size, size) uint8: gray values, and 255 where there is lung."""
    drawn = np.empty((count, 2, size, size), np.uint8)
    for index in range(count):
        phantom = make_exam(index, size=round(FINER * size), seed=seed).phantom
        for channel, picture in enumerate((phantom.pixels, 255 * phantom.masks[LUNGS].astype(np.uint8))):
            drawn[index, channel] = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(drawn)


@torch.no_grad()
def judged(network: LungField, chests: Tensor) -> float:
    """Mean Dice of the fields found, at a probability of one half, in chests as `draw_chests` gives them."""
    dice = []
    for part in chests.float().div(255).split(BATCH):
        x, lungs = part.split(1, 1)
        found = network(normalise_contrast(x))
        dice.append(soft_dice(found > 0.5, lungs > 0.5))
    return float(torch.cat(dice).mean())


@in_float32
def _varied(chests: Tensor) -> tuple[Tensor, Tensor]:
    """A batch as other positions, exposures and collimations might show it: images and lung fields."""
    warps = random_affine(len(chests), rotation_deg=15, scale=1.3, shift=0.1, device=chests.device)
    x, lungs = warp(chests.float() / 255, warps).split(1, 1)
    return random_plates(random_shading(random_exposure(x))), lungs


def _loss(network: LungField, x: Tensor, lungs: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        logits = network.logits(normalise_contrast(x)).float()
    return F.binary_cross_entropy_with_logits(logits, lungs) + (1 - soft_dice(logits.sigmoid(), lungs)).mean()
