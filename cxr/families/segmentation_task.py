"""How a network that finds masks is trained and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.augment.image_mask import Variation, augment_with_masks
from cxr.data.batch import NO_MASK, Batch
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Task, unit_pixels
from cxr.metrics.segmentation import hd95_rows, image_level, summary
from cxr.metrics.segmentation.mask_thresholds import MaskRule, choose_rule, decided, rule_rows
from cxr.models.segmentation_loss import MaskLoss, image_loss
from cxr.models.segmentation_model import SegmentationModel
from cxr.reporting import figures, palette

PICTURED = 6
TRUE_COLOR, FOUND_COLOR = palette.rgb(palette.TRUTH), palette.rgb(palette.PREDICTION)


@dataclass(frozen=True)
class Lesson:
    """What is shown and asked; see `SegmentationRecipe` for the fields.

    Args:
        first_stage: name of the stage at `first_size`.
        rule: by which masks are decided; None to choose it in each validation.
        distances: whether HD95 is measured.
    """

    mask_label: str
    size: int
    first_size: int
    first_stage: str
    loss: MaskLoss
    image_weight: float
    variation: Variation
    flip_test: bool
    rule: MaskRule | None
    distances: bool


class SegmentationTask(Task):
    """A mask finder in training.

    Args:
        start: loads what the network begins with; called once, when a new run begins.
    """

    def __init__(self, network: nn.Module, lesson: Lesson, start: Callable[[SegmentationModel], None]) -> None:
        super().__init__()
        self.network, self.lesson, self._start = network, lesson, start
        self.size = lesson.size
        self._rule = lesson.rule

    @property
    def _finder(self) -> SegmentationModel:
        assert isinstance(self.network, SegmentationModel)
        return self.network

    def enter_stage(self, stage: str) -> None:
        first = self.lesson.first_size > 0 and stage == self.lesson.first_stage
        self.size = self.lesson.first_size if first else self.lesson.size

    def begin(self, batches: Batches, workers: Communicator) -> None:
        self._start(self._finder)
        known = any(bool((batch[schema.MASKS][:, 0, 0] != NO_MASK).any()) for batch in batches())
        if not workers.sum(torch.tensor(float(known), device=self._finder.rule.device)).item():
            raise UserError(
                f"no image of the train split has a mask of {self.lesson.mask_label}: give an archive whose source "
                f"has such masks"
            )

    def augmented(self, batch: Batch) -> Batch:
        x, mask = augment_with_masks(*_shown(batch, self.size), self.lesson.variation)
        return batch | {schema.PIXELS: x[:, 0], schema.MASKS: mask[:, 0]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x, mask = _shown(batch, self.size)
        logits, image = self.network(x)
        terms = self.lesson.loss(logits, mask)
        if self.lesson.image_weight:
            terms["image"] = self.lesson.image_weight * image_loss(image, _present(mask))
        return terms

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Overlap of found and true masks over images whose mask is known; see `metrics.segmentation.summary`.

        image_auroc, image_sensitivity and image_specificity are of images with and without a mask; hd95_px, the
        mean over images of which it can be told, is in pixels of the network's input.
        """
        device = self._finder.rule.device
        nothing = torch.zeros(0, device=device)  # for a worker whose share has no image
        counts = [rule_rows(nothing.view(0, 1, 1), nothing.view(0, 1, 1))]
        images, far = [nothing], [torch.zeros(0, dtype=torch.float64)]
        for batch in batches():
            p, image, true = self._judged(batch)
            counts.append(rule_rows(p, true))
            images.append(image)
            if self.lesson.distances:
                far.append(hd95_rows((self._rule or MaskRule()).apply(p), true))
        rows = workers.gather(torch.cat(counts))
        if self.lesson.rule is None and len(rows):
            self._rule = choose_rule(rows)
            self._finder.rule.copy_(torch.tensor(tuple(self._rule.describe().values()), dtype=torch.float64))
        overlaps = decided(rows, self._rule or MaskRule())
        told = summary(overlaps) | image_level(
            overlaps, workers.gather(torch.cat(images)) if self.lesson.image_weight else None
        )
        if self.lesson.distances:
            told["hd95_px"] = float(workers.gather(torch.cat(far).to(device)).nanmean())
        return {name: value for name, value in told.items() if not math.isnan(value) or name == "dice"}

    def _judged(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of pixels and images, and true masks, of the images whose mask is known."""
        x, mask = _shown(batch, self.size)
        known = mask[:, 0, 0, 0] != NO_MASK
        p, image = self._finder.probabilities(x[known], mirrored=self.lesson.flip_test)
        return p, image, mask[known, 0] == 1

    def describe(self) -> dict[str, Any]:
        return {"mask_rule": self._rule.describe()} if self._rule else {}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """masks.png: images, true outlines, found outlines; those with something to find first."""
        batch = next(iter(batches()))
        x, mask = _shown(batch, self.lesson.size)
        order = torch.argsort((mask == 1).flatten(1).any(1).int(), descending=True, stable=True)[:PICTURED]
        x, mask = x[order], mask[order, 0] == 1
        p, _ = self._finder.probabilities(x, mirrored=self.lesson.flip_test)
        found = rule_of(self.network).apply(p)
        rows = {
            "given": x[:, 0],
            "true": outlined(x, mask, TRUE_COLOR) / 255,
            "found": outlined(x, found) / 255,
        }
        figure = figures.picture_rows({name: images.cpu().numpy() for name, images in rows.items()})
        figures.save_figure(figure, str(folder), "masks.png")


def rule_of(network: nn.Module) -> MaskRule:
    """By which a network's probabilities become masks."""
    assert isinstance(network, SegmentationModel)
    return MaskRule(*network.rule.tolist())


def outlined(x_B1HW: Tensor, mask_BHW: Tensor, color: tuple[int, int, int] = FOUND_COLOR) -> Tensor:
    """Images in [0, 1] with the outline of their bool masks, uint8 (B, H, W, 3)."""
    mask = mask_BHW[:, None].float()
    edge = F.max_pool2d(mask, 3, 1, 1) - mask
    paint = torch.tensor(color, device=x_B1HW.device).view(3, 1, 1) / 255
    return ((1 - edge) * x_B1HW + edge * paint).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _shown(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, size, size) in [0, 1], and their masks, uint8 of 0, 1, or `NO_MASK` throughout."""
    mask = batch[schema.MASKS][:, None]
    if mask.shape[-1] != size:
        shares = F.interpolate(mask.float(), size=(size, size), mode="area")
        mask = torch.where(shares > 1, NO_MASK, (shares >= 0.5).to(torch.uint8))
    return unit_pixels(batch, size), mask


def _present(mask_B1HW: Tensor) -> Tensor:
    """(B,) whether there is anything in the mask: 1, 0, or −1 where that is unknown."""
    any_B = (mask_B1HW == 1).flatten(1).any(1)
    return torch.where(mask_B1HW[:, 0, 0, 0] == NO_MASK, schema.UNKNOWN, any_B.int())
