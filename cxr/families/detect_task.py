"""How a detector is trained and judged: Ultralytics' loss on augmented batches, and its validator's metrics.

What is known of an image is known finding by finding: where its boxes are, that there are none, or neither. A finding
of the last kind, positive without a box or with an unknown label, must not be taught as background: it becomes a
region of the image in which that finding is unknown, which varies with the image as boxes do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.augment.mosaic import MosaicVariation, augment_with_boxes
from cxr.data.batch import MOST_BOXES, Batch
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Task, unit_pixels
from cxr.families.partner_window import USABLE, PartnerWindow
from cxr.metrics.yolo import judged_rows, summary
from cxr.models.detection_loss import DetectionLoss
from cxr.models.yolo import Yolo, YoloEnsemble
from cxr.reporting import figures, palette

VALIDATED = 300  # boxes of an image that validation looks at, as Ultralytics'
PICTURED, PICTURED_SCORE = 6, 0.1
UNKNOWN = "unknown"  # of an augmented batch: (B, K, 5) regions in which a finding is unknown, as boxes
TRUE_COLOR, FOUND_COLOR = palette.rgb(palette.TRUTH), palette.rgb(palette.PREDICTION)


@dataclass(frozen=True)
class Lesson:
    """What is shown and asked; see `DetectRecipe` for the fields.

    Args:
        partners: images of which mosaic and mixup take those that they add.
        open_epochs: epochs with mosaic and mixup; those after them are without.
        gains: weights of the loss terms: box, cls, dfl.
        found: what a network finds in a batch, at most so many boxes an image; see `models.yolo.found`.
        exclude: images of which a finding is unknown teach nothing, instead of all but that finding.
    """

    size: int
    variation: MosaicVariation
    partners: int
    open_epochs: int
    gains: Mapping[str, float]
    found: Callable[[nn.Module, Batch, int], Tensor]
    exclude: bool = False


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
        self.window = PartnerWindow(lesson.partners, self._shared)

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

    def begin(self, batches: Batches, workers: Communicator) -> None:
        self._start(self.network)
        boxed = any(not bool(batch[schema.BOXES].isnan().all()) for batch in batches())
        if not workers.sum(torch.tensor(float(boxed), device=self.epoch.device)).item():
            raise UserError("no image of the train split has a box: give an archive whose source has boxes")

    def end_epoch(self, workers: Communicator) -> None:
        self.epoch += 1

    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's boxes (B, M, 5), and of which findings it is known whether and where images show them, (B, F)."""
        boxes, known = batch[schema.BOXES], known_places(batch)
        if self.lesson.exclude:
            whole = known.all(1)
            boxes, known = torch.where(whole[:, None, None], boxes, torch.nan), known & whole[:, None]
        return boxes, known

    def look_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self.window.look_ahead(batches) if self.variation.combines else batches

    def _shared(self, batch: Batch) -> dict[str, Tensor]:
        """What an image brings into a mosaic or mixup: pixels as stored, boxes, regions of what is unknown of it."""
        boxes, known = self.truth(batch)
        given = torch.cat([boxes, marked(unknown_regions(known))], 1)
        return {schema.PIXELS: batch[schema.PIXELS], schema.BOXES: given, USABLE: known.any(1)}

    def augmented(self, batch: Batch) -> Batch:
        """Images and boxes varied together; only images of which something is known are shown beside, or in, others.

        pixels: (B, size, size). boxes: (B, N, 5), at most `MOST_BOXES` of an image, or as many as the archive's
        images have; if a mosaic has more, their findings are unknown in it. "unknown": see `UNKNOWN`.
        """
        if self.variation.combines:
            self.window.show(batch)
        given, findings = self._shared(batch)[schema.BOXES], batch[schema.LABELS].shape[1]
        x, moved = augment_with_boxes(unit_pixels(batch, self.lesson.size), given, self.variation, self._partners)
        most = max(MOST_BOXES, batch[schema.BOXES].shape[1])
        shown = first_boxes(torch.where(moved[..., :1] >= 0, moved, torch.nan))
        regions = first_boxes(torch.where(moved[..., :1] < 0, moved, torch.nan))
        regions = regions[:, : moved.shape[1] // given.shape[1] * findings]  # of the images that are shown together
        beyond = unknown_regions(~of_findings(shown[:, most:], findings))
        unknown = torch.cat([marked(regions), beyond], 1)
        return batch | {schema.PIXELS: x[:, 0], schema.BOXES: shown[:, :most], UNKNOWN: unknown}

    def _partners(self, count: int) -> tuple[Tensor, Tensor]:
        rows = self.window.draw(count)
        return unit_pixels(rows, self.lesson.size), rows[schema.BOXES]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of what is known of the images; those of which nothing is go through the network and weigh nothing.

        So every step has as many images, on every worker, and nobody has to wait to learn how many count.
        """
        boxes, unknown = batch[schema.BOXES], batch.get(UNKNOWN)
        if unknown is None:  # images as they are
            boxes, known = self.truth(batch)
            unknown = unknown_regions(known)
        loss = DetectionLoss(self._yolo.strides, self.lesson.gains, self.workers.sum, self.workers.size)
        return loss(self.network(unit_pixels(batch, self.lesson.size)), boxes, unknown)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Of the findings of each image of which it is known whether and where it shows them; see `yolo.summary`."""
        nothing = torch.zeros(0, device=self.epoch.device)  # for a worker whose share has no image
        rows, true = [judged_rows(nothing.view(0, 1, 6), nothing.view(0, 1, 5))], [nothing]
        for batch in batches():
            boxes, known = self.truth(batch)
            found = self.lesson.found(self.network, batch, VALIDATED)
            rows.append(judged_rows(of_known(found, known), boxes))
            true.append(boxes[..., 0][~boxes[..., 0].isnan()])
        told = summary(workers.gather(torch.cat(rows)), workers.gather(torch.cat(true)), self._findings)
        return {name: value for name, value in told.items() if value == value or name == "map50_95"}

    def describe(self) -> dict[str, Any]:
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
            "true": outlined(x, true[..., 1:], TRUE_COLOR).numpy() / 255,
            f"found, score from {PICTURED_SCORE:g}": outlined(x, confident(boxes)).numpy() / 255,
        }
        figures.save_figure(figures.picture_rows(rows), str(folder), "boxes.png")


def known_places(batch: Batch) -> Tensor:
    """(B, F) bool: findings of which it is known whether and where an image shows them.

    As `metrics.localization.known_places` has it for reports: those that have a box, or a negative label.
    """
    labels = batch[schema.LABELS]
    return of_findings(batch[schema.BOXES], labels.shape[1]) | (labels == schema.NEGATIVE)


def of_findings(boxes_BN5: Tensor, findings: int) -> Tensor:
    """(B, F) bool: findings of which an image has a box."""
    return (boxes_BN5[..., :1] == torch.arange(findings, device=boxes_BN5.device)).any(1)


def unknown_regions(known_BF: Tensor) -> Tensor:
    """(B, F, 5) a box around the whole image for each finding that is not known; NaN for the others."""
    low, high = torch.zeros_like(known_BF, dtype=torch.float32), torch.ones_like(known_BF, dtype=torch.float32)
    index = torch.arange(known_BF.shape[1], dtype=low.dtype, device=known_BF.device).expand_as(low)
    return torch.where(known_BF[..., None], torch.nan, torch.stack([index, low, low, high, high], -1))


def marked(boxes_BN5: Tensor) -> Tensor:
    """Boxes as the regions that `augment.mosaic.augment_with_boxes` takes, whose index is below 0; and back."""
    return torch.cat([-1 - boxes_BN5[..., :1], boxes_BN5[..., 1:]], -1)


def of_known(found_BN6: Tensor, known_BF: Tensor) -> Tensor:
    """Found boxes of findings that are known of their image; NaN in place of the others."""
    finding = found_BN6[..., 5].nan_to_num(0).long()
    return torch.where(known_BF.gather(1, finding)[..., None], found_BN6, torch.nan)


def first_boxes(boxes_BN5: Tensor) -> Tensor:
    """Boxes before NaN, their order kept."""
    order = torch.argsort(boxes_BN5[..., 0].isnan(), dim=1, stable=True)[..., None]
    return boxes_BN5.gather(1, order.expand(-1, -1, 5))


def confident(found_BN6: Tensor) -> Tensor:
    """Boxes (B, N, 4) worth a picture; NaN in place of the others."""
    return torch.where(found_BN6[..., 4:5] >= PICTURED_SCORE, found_BN6[..., :4], torch.nan)


def outlined(x_B1HW: Tensor, boxes_BN4: Tensor, color: tuple[int, int, int] = FOUND_COLOR) -> Tensor:
    """Images in [0, 1] with the outlines of boxes, shares of the image or NaN, uint8 (B, H, W, 3) on the CPU."""
    pictures = (x_B1HW[:, 0, :, :, None].expand(-1, -1, -1, 3) * 255).round().to(torch.uint8).cpu().numpy().copy()
    size = np.array([x_B1HW.shape[-1], x_B1HW.shape[-2]] * 2)
    for picture, boxes in zip(pictures, boxes_BN4.cpu().numpy(), strict=True):
        for box in boxes[~np.isnan(boxes[:, 0])]:
            left, top, right, bottom = np.rint(box.clip(0, 1) * size).astype(int).tolist()
            cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), color, max(1, picture.shape[0] // 256))
    return torch.from_numpy(pictures)
