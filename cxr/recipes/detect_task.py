"""How a detector is trained and judged: Ultralytics' loss on augmented batches, and its validator's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.batches import HAS_BOXES, MOST_BOXES
from cxr.errors import UserError
from cxr.imaging.mosaic import MosaicVariation, varied
from cxr.metrics.yolo import judged_rows, summary
from cxr.models.detection_loss import DetectionLoss
from cxr.models.yolo import Yolo, YoloEnsemble
from cxr.recipes.base import Batch, Batches, Task, Workers, unit_pixels
from cxr.report import figures

VALIDATED = 300  # boxes of an image that validation looks at, as Ultralytics'
PICTURED, PICTURED_SCORE = 6, 0.1
TRUE_COLOUR, FOUND_COLOUR = (251, 191, 36), (52, 211, 153)


@dataclass(frozen=True)
class Lesson:
    """What is shown and asked; see `DetectRecipe` for the fields.

    Args:
        open_epochs: epochs with mosaic and mixup; those after them are without.
        gains: weights of the loss terms: box, cls, dfl.
        found: what a network finds in a batch, at most so many boxes an image; see `models.yolo.found`.
    """

    size: int
    variation: MosaicVariation
    open_epochs: int
    gains: Mapping[str, float]
    found: Callable[[nn.Module, Batch, int], Tensor]


class DetectTask(Task):
    """A detector in training.

    Args:
        start: loads what the network begins with; called once, when a new run begins.
    """

    epoch: Tensor  # epochs trained

    def __init__(self, network: nn.Module, lesson: Lesson, start: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.network, self.lesson, self._start = network, lesson, start
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.variation = lesson.variation  # of this epoch's images

    @property
    def _yolo(self) -> Yolo:
        assert isinstance(self.network, Yolo)
        return self.network

    @property
    def _findings(self) -> int:
        assert isinstance(self.network, Yolo | YoloEnsemble)
        return len(self.network.findings)

    def train(self, mode: bool = True) -> DetectTask:
        """Also decides how the epoch's images vary: the loop calls this once per epoch, when it may wait."""
        super().train(mode)
        if mode:
            still_open = int(self.epoch) < self.lesson.open_epochs
            closed = replace(self.lesson.variation, mosaic=0.0, mixup=0.0)
            self.variation = self.lesson.variation if still_open else closed
        return self

    def begin(self, batches: Batches, workers: Workers) -> None:
        self._start(self.network)
        boxed = any(not bool(batch[schema.BOXES].isnan().all()) for batch in batches())
        if not workers.sum(torch.tensor(float(boxed), device=self.epoch.device)).item():
            raise UserError("no image of the train split has a box: give an archive whose source has boxes")

    def end_epoch(self, workers: Workers) -> None:
        self.epoch += 1

    def augmented(self, batch: Batch) -> Batch:
        """Images and boxes varied together; only images whose boxes are known are shown beside, or in, others.

        pixels: (B, size, size). boxes: (B, N, 5), at most `MOST_BOXES` of an image.
        """
        x = unit_pixels(batch, self.lesson.size)
        x, boxes = varied(x, batch[schema.BOXES], self.variation, known_boxes(batch))
        return batch | {schema.PIXELS: x[:, 0], schema.BOXES: first_boxes(boxes, MOST_BOXES)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of the images whose boxes are known: the others go through the network and weigh nothing.

        So every step has as many images, on every worker, and nobody has to wait to learn how many count.
        """
        loss = DetectionLoss(self._yolo.strides, self.lesson.gains, self.workers.sum, self.workers.size)
        known = known_boxes(batch)[:, None].expand(-1, self._findings)
        return loss(self.network(unit_pixels(batch, self.lesson.size)), batch[schema.BOXES], known)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Workers) -> dict[str, float]:
        """Of images whose boxes are known; see `metrics.yolo.summary`."""
        nothing = torch.zeros(0, device=self.epoch.device)  # for a worker whose share has no image
        rows, true = [judged_rows(nothing.view(0, 1, 6), nothing.view(0, 1, 5))], [nothing]
        for batch in batches():
            known = known_boxes(batch)
            boxes = batch[schema.BOXES][known]
            rows.append(judged_rows(self.lesson.found(self.network, batch, VALIDATED)[known], boxes))
            true.append(boxes[..., 0][~boxes[..., 0].isnan()])
        told = summary(workers.gather(torch.cat(rows)), workers.gather(torch.cat(true)), self._findings)
        return {name: value for name, value in told.items() if value == value or name == "map50_95"}

    def described(self) -> dict[str, Any]:
        return {"epochs": int(self.epoch)}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """boxes.png: images, their true boxes, found ones; those with most boxes first."""
        batch = next(iter(batches()))
        order = torch.argsort((~batch[schema.BOXES][..., 0].isnan()).sum(1), descending=True, stable=True)[:PICTURED]
        x, true = unit_pixels(batch, self.lesson.size)[order], batch[schema.BOXES][order]
        boxes = self.lesson.found(self.network, batch, VALIDATED)[order]
        rows = {
            "given": x[:, 0].cpu().numpy(),
            "true": outlined(x, true[..., 1:], TRUE_COLOUR).numpy() / 255,
            f"found, score from {PICTURED_SCORE:g}": outlined(x, confident(boxes)).numpy() / 255,
        }
        figures.save_figure(figures.picture_rows(rows), str(folder), "boxes.png")


def known_boxes(batch: Batch) -> Tensor:
    """(B,) bool: images whose boxes their source lists, or that have no finding, and so no box."""
    return batch[HAS_BOXES] | (batch[schema.LABELS] == schema.NEGATIVE).all(1)


def first_boxes(boxes_BN5: Tensor, most: int) -> Tensor:
    """Boxes before NaN, their order kept, and of each image the first `most` at most."""
    if boxes_BN5.shape[1] <= most:
        return boxes_BN5
    order = torch.argsort(boxes_BN5[..., 0].isnan(), dim=1, stable=True)[:, :most, None]
    return boxes_BN5.gather(1, order.expand(-1, -1, 5))


def confident(found_BN6: Tensor) -> Tensor:
    """Boxes (B, N, 4) worth a picture; NaN in place of the others."""
    return torch.where(found_BN6[..., 4:5] >= PICTURED_SCORE, found_BN6[..., :4], torch.nan)


def outlined(x_B1HW: Tensor, boxes_BN4: Tensor, colour: tuple[int, int, int] = FOUND_COLOUR) -> Tensor:
    """Images in [0, 1] with the outlines of boxes, shares of the image or NaN, uint8 (B, H, W, 3) on the CPU."""
    pictures = (x_B1HW[:, 0, :, :, None].expand(-1, -1, -1, 3) * 255).round().to(torch.uint8).cpu().numpy().copy()
    size = np.array([x_B1HW.shape[-1], x_B1HW.shape[-2]] * 2)
    for picture, boxes in zip(pictures, boxes_BN4.cpu().numpy(), strict=True):
        for box in boxes[~np.isnan(boxes[:, 0])]:
            left, top, right, bottom = np.rint(box.clip(0, 1) * size).astype(int).tolist()
            cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), colour, max(1, picture.shape[0] // 256))
    return torch.from_numpy(pictures)
