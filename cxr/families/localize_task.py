"""How a network that localizes findings by their labels alone is trained and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.augment.affine_exposure import random_affine, random_exposure
from cxr.augment.crops import random_flips
from cxr.boxes import iou
from cxr.boxes.from_heatmaps import FULL, BoxRule, MapBoxes, boxes_of
from cxr.data.batch import HAS_BOXES, Batch
from cxr.families import label_metrics
from cxr.families.base import Batches, Communicator, Task, unit_pixels
from cxr.models.multiscale_cam import MultiscaleCAM
from cxr.models.spatial_transformer import warp
from cxr.reporting import attention, figures

COUNTED = 20_000  # training images, over all workers, from which the findings' frequencies are taken
PICTURED = 8
OVERLAP = 0.3  # IoU from which a found box is right


@dataclass(frozen=True)
class Lesson:
    """What is shown and asked; see `LocalizeRecipe` for the fields."""

    size: int
    map_stride: int
    rule: BoxRule
    balance: float
    flip: float
    rotation_deg: float
    scale: float
    shift: float
    exposure: float


class LocalizeTask(Task):
    """A multiscale CAM in training.

    Args:
        start: loads what the network begins with; called once, when a new run begins.
    """

    class_weight: Tensor

    def __init__(self, network: nn.Module, lesson: Lesson, start: Callable[[MultiscaleCAM], None]) -> None:
        super().__init__()
        self.network, self.lesson, self._start = network, lesson, start
        self._thresholds: dict[str, Any] = {}
        self.register_buffer("class_weight", torch.ones(2, len(self._net.findings)))

    @property
    def _net(self) -> MultiscaleCAM:
        assert isinstance(self.network, MultiscaleCAM)
        return self.network

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Load what training starts from; count labels, by which the two classes of a finding weigh alike."""
        self._start(self._net)
        counts = torch.zeros(2, self.class_weight.shape[1], device=self.class_weight.device)
        seen = 0
        for batch in batches():
            labels = batch[schema.LABELS]
            counts += torch.stack([(labels == value).sum(0) for value in (schema.NEGATIVE, schema.POSITIVE)])
            seen += len(labels)
            if seen >= COUNTED / workers.size:
                break
        counts = workers.sum(counts).clamp(min=1)
        self.class_weight = (counts.sum(0) / counts) ** self.lesson.balance

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"bce": self._bce(self.network(unit_pixels(batch, self.lesson.size)), batch)}

    def augmented(self, batch: Batch) -> Batch:
        x_B1HW, lesson = unit_pixels(batch, self.lesson.size), self.lesson
        if lesson.rotation_deg or lesson.scale != 1 or lesson.shift:
            moves = random_affine(
                len(x_B1HW),
                rotation_deg=lesson.rotation_deg,
                scale=lesson.scale,
                shift=lesson.shift,
                device=x_B1HW.device,
            )
            x_B1HW = warp(x_B1HW, moves)
        if lesson.flip:
            x_B1HW = random_flips(x_B1HW, lesson.flip)
        if lesson.exposure:
            x_B1HW = _exposed(x_B1HW, lesson.exposure)
        return batch | {schema.PIXELS: x_B1HW[:, 0]}

    def _bce(self, logits_BF: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with a weight for each class (Wang et al. 2017, W-CEL, a finding at a time).

        Mean over images and findings; an unknown label counts 0. The divisor does not depend on what is known, so
        that workers' means are the whole batch's mean.
        """
        labels = batch[schema.LABELS]
        negative, positive = self.class_weight
        weight = torch.where(labels == schema.POSITIVE, positive, negative) * (labels != schema.UNKNOWN)
        return F.binary_cross_entropy_with_logits(logits_BF.float(), (labels == schema.POSITIVE).float(), weight)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """How well findings are told, and where there are boxes, how often one is found.

        mean_auroc and mean_ap are means over the `findings_measured`, those with both classes; auroc/FINDING is
        each one's. accuracy_iou30 is the share of `boxes_measured`, pairs of an image and a finding with true boxes,
        of which a found box has an IoU of at least .3 with a true one, in the frame of the network's input. The
        thresholds and the scale of the maps are chosen here, and kept in the network.
        """
        net, findings = self._net, len(self._net.findings)
        rows = [torch.zeros(0, 2 * findings * (1 + len(net.heads)), device=self.class_weight.device)]
        for batch in batches():
            maps = net.maps(unit_pixels(batch, self.lesson.size))
            told = [net.logits(maps).sigmoid(), batch[schema.LABELS].float()]
            rows.append(
                torch.cat([*told, *(one.mean((2, 3)) for one in maps), *(one.amax((2, 3)) for one in maps)], 1)
            )
        scores, labels, *heights = workers.gather(torch.cat(rows)).split(findings, 1)
        if len(scores):
            self._scale(labels, *torch.stack(heights).chunk(2))
        metrics, self._thresholds = label_metrics.judge(net, scores, labels)
        return metrics | self._located(batches, workers)

    def _scale(self, labels_NF: Tensor, means_SNF: Tensor, peaks_SNF: Tensor) -> None:
        low = _mean_where(labels_NF == schema.NEGATIVE, means_SNF)
        self._net.scale_maps(low, _mean_where(labels_NF == schema.POSITIVE, peaks_SNF))

    def _located(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """A second pass, over the images that have boxes, since the maps' scale is known only after the first."""
        right = [
            best >= OVERLAP
            for batch in batches()
            for found, true in self._with_boxes(batch)
            for best in _overlaps(found, true)
        ]
        counts = torch.tensor([sum(right), len(right)], dtype=torch.float64, device=self.class_weight.device)
        hits, measured = workers.sum(counts).tolist()
        return {"accuracy_iou30": hits / measured, "boxes_measured": measured} if measured else {}

    def _with_boxes(self, batch: Batch) -> Iterator[tuple[MapBoxes, np.ndarray]]:
        """Found and true boxes (N, 5), the finding first, of the images that have true ones."""
        some = _boxed_rows(batch)
        if len(some):
            shown = {schema.PIXELS: batch[schema.PIXELS][some]}
            _, heat, p = looked(self._net, unit_pixels(shown, self.lesson.size), self.lesson.map_stride)
            for one, of, listed in zip(heat.cpu().numpy(), p.cpu().numpy(), batch[schema.BOXES][some], strict=True):
                yield boxes_found(one, of, self.lesson.rule), listed[~listed[:, 0].isnan()].cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """Relevance by finding, fine stages first; the thresholds; the maps' scale as (stages, findings)."""
        net = self._net
        relevance = net.relevance().T.tolist()
        return {
            "relevance": dict(zip(net.findings, relevance, strict=True)),
            "stage_strides_px": [reach.stride for reach in net.reaches],
            "map_scale": {"low": net.low.tolist(), "high": net.high.tolist()},
            **({"thresholds": self._thresholds} if self._thresholds else {}),
        }

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """relevance.png: the stages' weights. boxes.png: images, the map of a finding that each shows, its boxes."""
        net, lesson = self._net, self.lesson
        strides = [f"stride {reach.stride}" for reach in net.reaches]
        weights = attention.relevance_figure(net.relevance().cpu().numpy(), net.findings, strides)
        figures.save_figure(weights, str(folder), "relevance.png")
        batch = next(iter(batches()))
        some = _boxed_rows(batch)[:PICTURED]
        if not len(some):
            some = torch.arange(min(PICTURED, len(batch[schema.PIXELS])))
        shown = {name: values[some] for name, values in batch.items()}
        x = unit_pixels(shown, lesson.size)
        _, heat, p = looked(net, x, lesson.map_stride)
        tiles = [
            tile
            for one, of, picture, true in zip(
                heat.cpu().numpy(), p.cpu().numpy(), x[:, 0].cpu().numpy(), _true(shown), strict=True
            )
            for tile in self._compared(picture, one, of, true)
        ]
        title = "true boxes blue, found ones orange; beside each image the map they come from"
        figures.save_figure(attention.sheet_figure(tiles, 4, title), str(folder), "boxes.png")

    def _compared(
        self, picture_HW: np.ndarray, heat_FHW: np.ndarray, p_F: np.ndarray, true_N5: np.ndarray
    ) -> Sequence[np.ndarray]:
        """The image with true and found boxes of the first finding that has true ones, else of the most probable."""
        finding = int(true_N5[0, 0]) if len(true_N5) else int(p_F.argmax())
        found = boxes_found(heat_FHW, p_F, self.lesson.rule)
        own = found.boxes_N4[found.index_N == finding]
        true = true_N5[true_N5[:, 0] == finding, 1:]
        plain = attention.boxed(attention.heated(picture_HW, np.zeros((1, 1))), true, attention.TRUE_BGR)
        warm = attention.heated(picture_HW, heat_FHW[finding] / FULL)
        name = f"{self._net.findings[finding]} {p_F[finding]:.2f}"
        return attention.titled(attention.boxed(plain, own), name), attention.boxed(warm, own)


def _exposed(x_B1HW: Tensor, much: float) -> Tensor:
    """Images as another exposure might show them; `much` from 0 (the same) to 1."""
    return random_exposure(
        x_B1HW, gamma=1 + 0.5 * much, contrast=0.3 * much, brightness=0.1 * much, noise=0.02 * much
    )


def looked(network: MultiscaleCAM, x_B1HW: Tensor, stride: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Each stage's maps; heat maps uint8 (B, F, size / stride, size / stride); probabilities (B, F)."""
    maps = network.maps(x_B1HW)
    heat = network.attention(maps, x_B1HW.shape[-1], stride).mul(FULL).round().to(torch.uint8)
    return maps, heat, network.logits(maps).sigmoid()


def boxes_found(heat_FHW: np.ndarray, p_F: np.ndarray, rule: BoxRule) -> MapBoxes:
    """An image's boxes; a score is the finding's probability times the mean heat of the hot cells in the box."""
    found = boxes_of(heat_FHW, rule)
    return dataclasses.replace(found, score_N=found.score_N * p_F[found.index_N])


def _overlaps(found: MapBoxes, true_N5: np.ndarray) -> list[float]:
    """Of each finding with true boxes the best IoU of a found one."""
    findings = np.unique(true_N5[:, 0]).astype(int)
    pairs = ((found.boxes_N4[found.index_N == f], true_N5[true_N5[:, 0] == f, 1:]) for f in findings)
    return [float(iou(*pair).max(initial=0)) for pair in pairs]


def _boxed_rows(batch: Batch) -> Tensor:
    """Numbers of the images that have true boxes."""
    if schema.BOXES not in batch:
        return torch.zeros(0, dtype=torch.long)
    return (batch[HAS_BOXES] & ~batch[schema.BOXES][:, 0, 0].isnan()).nonzero()[:, 0]


def _true(batch: Batch) -> list[np.ndarray]:
    """True boxes (N, 5) of each image."""
    if schema.BOXES not in batch:
        return [np.zeros((0, 5))] * len(batch[schema.PIXELS])
    return [listed[~listed[:, 0].isnan()].cpu().numpy() for listed in batch[schema.BOXES]]


def _mean_where(rows_NF: Tensor, values_SNF: Tensor) -> Tensor:
    """(S, F) mean over those rows that count for a finding; over all where none does."""
    counted = torch.where(rows_NF.any(0), rows_NF, True).float()
    return (values_SNF * counted).sum(1) / counted.sum(0)
