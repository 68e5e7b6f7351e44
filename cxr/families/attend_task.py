"""How a network of family `attend` is trained and judged: pairs of images, boxes, metrics and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import boxes, schema
from cxr.augment.affine_exposure import random_affine
from cxr.boxes.from_heatmaps import BoxRule, MapBoxes, boxes_of
from cxr.data.batch import HAS_BOXES, Batch
from cxr.families import label_metrics
from cxr.families.base import Batches, Communicator, Task, unit_pixels
from cxr.models.contrast_attention import ContrastAttention, contrast, probabilities, warp_boxes
from cxr.models.mil_loss import MILLoss, cells_inside
from cxr.models.spatial_transformer import compose, identity, invert, warp
from cxr.reporting import figures

OVERLAPS = (0.1, 0.3, 0.5, 0.7)  # IoU from which a found box is right
FINER = 4  # steps of a map within a cell, so that a box may end between two cells
PARTNER = "partner"  # column of an augmented batch
PICTURED = 6
_HASHES = 1 << 20


@dataclass(frozen=True)
class Lesson:
    """What training images are shown as, and what is asked of them; see `AttendRecipe` for the fields."""

    size: int
    aligner_size: int
    loss: MILLoss
    box_share: float
    rotation_deg: float
    scale: float
    shift: float
    rule: BoxRule
    box_least: float


class AttendTask(Task):
    """A contrast-attention network in training.

    Args:
        start: loads what the network begins with; called once, when a new run begins.
    """

    negative: Tensor
    negatives_seen: Tensor
    _sum: Tensor  # of the features of images without findings in this epoch's steps
    _count: Tensor  # of those images

    def __init__(self, network: nn.Module, lesson: Lesson, start: Callable[[ContrastAttention], None]) -> None:
        super().__init__()
        self.network, self.lesson, self._start = network, lesson, start
        self._thresholds: dict[str, Any] = {}
        mean = self._net.mean_negative
        self.register_buffer("negative", torch.zeros_like(mean))
        self.register_buffer("negatives_seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("_sum", torch.zeros_like(mean, dtype=torch.float64), persistent=False)
        self.register_buffer("_count", torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def _net(self) -> ContrastAttention:
        assert isinstance(self.network, ContrastAttention)
        return self.network

    def compiled_modules(self) -> list[nn.Module]:
        return [*self._net.layers(), self._net.head]

    def begin(self, batches: Batches, workers: Communicator) -> None:
        self._start(self._net)

    def augmented(self, batch: Batch) -> Batch:
        """Aligned images turned, scaled and shifted, their boxes with them, and with which each is compared.

        pixels: (B, size, size). boxes: of the share of images whose boxes are used. partner: (B,), see `partners`.
        """
        x, theta = self._shown(batch, augmented=True)
        without = self.workers.all_rows((batch[schema.LABELS] == schema.NEGATIVE).all(1).to(torch.uint8)) > 0
        drawn = partners(without, self.workers.rank * len(x), len(x))
        return batch | {schema.PIXELS: x[:, 0], schema.BOXES: self._boxes_shown(batch, theta), PARTNER: drawn}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each image is compared with one of all workers' images without findings, drawn anew in each step.

        Where the step has no other such image, the mean of those seen in the last epoch stands in for it, as in use.
        """
        labels = batch[schema.LABELS]
        own = self._net.features(unit_pixels(batch, self.lesson.size))
        self._remember(own.detach(), (labels == schema.NEGATIVE).all(1))
        other = compared(self.workers.all_rows(own), batch[PARTNER], self.negative)
        marked = cells_inside(batch[schema.BOXES], len(self._net.findings), self._net.grid)
        return self.lesson.loss(self._net.located(own, other), labels, marked)

    def _shown(self, batch: Batch, *, augmented: bool = False) -> tuple[Tensor, Tensor]:
        """Images as the network sees them, (B, 1, size, size), and the transforms from there to the images given."""
        x, theta = in_frame(self._net, batch, self.lesson.size, self.lesson.aligner_size)
        if augmented:
            settings = self.lesson
            varied = random_affine(
                len(x),
                rotation_deg=settings.rotation_deg,
                scale=settings.scale,
                shift=settings.shift,
                device=x.device,
            )
            theta = varied if theta is None else compose(theta, varied)
        if theta is None:
            return x, identity(len(x), x.device)
        return warp(x, theta), theta

    def _boxes_shown(self, batch: Batch, theta: Tensor) -> Tensor:
        """Boxes where `_shown` shows what they mark, (B, N, 5); NaN in images whose boxes are not used."""
        given = batch[schema.BOXES]
        shown = torch.cat([given[..., :1], warp_boxes(given[..., 1:], invert(theta))], -1)
        used = batch[schema.IMAGE_ID] % _HASHES < self.lesson.box_share * _HASHES
        return torch.where(used[:, None, None], shown, torch.nan)

    def _remember(self, features_BCPP: Tensor, without_B: Tensor) -> None:
        """Count the features of images without findings."""
        chosen = torch.where(without_B[:, None, None, None], features_BCPP.float(), 0.0)
        self._sum, self._count = self._sum + chosen.sum(0).double(), self._count + without_B.sum()

    def end_epoch(self, workers: Communicator) -> None:
        """Take the mean over all workers' images without findings, as they were seen in this epoch's steps."""
        message = workers.sum(torch.cat([self._sum.flatten(), self._count.reshape(1)]))
        total, count = message[:-1].reshape(self._sum.shape), message[-1]
        if count > 0:
            self.negative, self.negatives_seen = (total / count).to(self.negative), count.to(self.negatives_seen)
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """How well findings are told, and found, as in use: no label and no box is looked at to make a prediction.

        mean_auroc and mean_ap are means over the `findings_measured`, those with both classes; auroc/FINDING is
        each one's. located_iou30, say, is the share of findings with known boxes whose most probable found box
        overlaps one of them by an IoU of at least .3, over all images and `boxes_measured` in number. The mean of
        features of images without findings, and the thresholds chosen here, are kept in the network.
        """
        net = self._net
        net.mean_negative.copy_(self.negative)
        device, count = net.mean_negative.device, len(net.findings)
        scores = [torch.zeros(0, 2 * count, device=device)]
        overlaps = [torch.zeros(0, dtype=torch.float64, device=device)]
        for batch in batches():
            x, theta = self._shown(batch)
            logits = net(x)
            scores.append(torch.cat([probabilities(logits), batch[schema.LABELS].float()], 1))
            found = boxes_found(logits, theta, self.lesson.rule, self.lesson.box_least)
            overlaps.append(torch.from_numpy(best_overlaps(found, batch)).to(device))
        metrics, self._thresholds = label_metrics.judge(net, *workers.gather(torch.cat(scores)).chunk(2, 1))
        return metrics | _located(workers.gather(torch.cat(overlaps)))

    def describe(self) -> dict[str, Any]:
        compared = {
            "compared_with": "the mean features of training images without findings",
            "images_without_findings": int(self.negatives_seen),
        }
        return compared | ({"thresholds": self._thresholds} if self._thresholds else {})

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """attention.png: images as given and aligned, with true and found boxes, and the attention."""
        batch = next(iter(batches()))
        order = torch.argsort(batch[schema.BOXES][:, 0, 0].isnan().int(), stable=True)[:PICTURED]
        batch = {name: values[order] for name, values in batch.items()}
        x, theta = self._shown(batch)
        own = self._net.features(x)
        logits = self._net.located(own, self._net.mean_negative)
        given = unit_pixels(batch, self.lesson.size)
        rows = {
            "given, true boxes": framed(given, batch[schema.BOXES][..., 1:]),
            "given, boxes of the best found finding": framed(given, self._best(logits, theta)),
            "aligned, the same": framed(x, self._best(logits, identity(len(x)))),
            "attention": contrast(own, self._net.mean_negative)[:, 0],
        }
        figure = figures.picture_rows({name: images.cpu().numpy() for name, images in rows.items()})
        figures.save_figure(figure, str(folder), "attention.png")

    def _best(self, logits_BKPP: Tensor, theta: Tensor) -> Tensor:
        rule = self.lesson.rule
        return strongest(boxes_found(logits_BKPP, theta, rule), rule.max_boxes).to(logits_BKPP.device)


def partners(without_A: Tensor, first: int, count: int) -> Tensor:
    """(count,) for each of a worker's images the number of another without findings, drawn evenly; −1: there is none.

    Args:
        without_A: bool, which images of all workers' step have no findings.
        first: number of the worker's first image among these.
    """
    images = torch.arange(len(without_A), device=without_A.device)
    others_BA = without_A & (images != images[first : first + count, None])
    lots_BA = torch.rand(count, len(without_A)).to(without_A.device, non_blocking=True)
    return torch.where(others_BA.any(1), torch.where(others_BA, lots_BA, -1).argmax(1), -1)


def compared(features_ACPP: Tensor, partner_B: Tensor, mean_CPP: Tensor) -> Tensor:
    """The features of each image's partner, of all workers' features; the mean where the partner is −1."""
    none_B = (partner_B < 0)[:, None, None, None]
    return torch.where(none_B, mean_CPP.to(features_ACPP.dtype), features_ACPP[partner_B.clamp(min=0)])


def in_frame(net: ContrastAttention, batch: Batch, size: int, aligner_size: int) -> tuple[Tensor, Tensor | None]:
    """A batch's images of `size` as they are given, and the transforms from the common frame to them, if any."""
    theta = None if net.aligner is None else net.theta(unit_pixels(batch, aligner_size))
    return unit_pixels(batch, size), theta


@torch.no_grad()
def boxes_found(logits_BKPP: Tensor, theta: Tensor, rule: BoxRule, least: float = 0.0) -> list[MapBoxes]:
    """Each image's boxes, as shares of the image as given; of each finding, the best first.

    `rule` sees each map of p_j as a share of its maximum: how probable a finding is says nothing of where it would
    be. A score is the finding's probability times the region's mean of that share.

    Args:
        theta: (B, 2, 3) from the frame of the logits to the image.
        least: probability below which a finding has no box.
    """
    shares, p = _shares_of_peak(logits_BKPP), probabilities(logits_BKPP).double().cpu().numpy()
    boxed = boxes_of(shares.flatten(0, 1).cpu().numpy(), rule)
    image_N, finding_N = np.divmod(boxed.index_N, p.shape[1])
    moved = warp_boxes(torch.from_numpy(boxed.boxes_N4)[:, None], theta.cpu()[torch.from_numpy(image_N)])[:, 0]
    p_N = p[image_N, finding_N]
    told = MapBoxes(finding_N, moved.clamp(0, 1).numpy(), p_N * boxed.score_N)
    of_image = ((image_N == i) & (p_N >= least) for i in range(len(p)))
    return [MapBoxes(told.index_N[own], told.boxes_N4[own], told.score_N[own]) for own in of_image]


def _shares_of_peak(logits_BKPP: Tensor) -> Tensor:
    """Each map of p_j, `FINER`, divided by its maximum."""
    finer = F.interpolate(logits_BKPP.float().sigmoid(), scale_factor=FINER, mode="bilinear")
    return finer / finer.amax((2, 3), keepdim=True).clamp(min=1e-30)


def best_overlaps(found: Sequence[MapBoxes], batch: Batch) -> np.ndarray:
    """IoU of each boxed finding's first found box, or 0 without one, with the nearest true one."""
    overlaps = []
    for boxed, known, marks in zip(found, batch[HAS_BOXES].tolist(), batch[schema.BOXES].cpu().numpy(), strict=True):
        true = marks[~np.isnan(marks[:, 0])] if known else marks[:0]
        for finding in np.unique(true[:, 0]):
            first = boxed.boxes_N4[boxed.index_N == finding][:1]
            overlaps.append(boxes.iou(first, true[true[:, 0] == finding, 1:]).max(initial=0.0))
    return np.array(overlaps, np.float64)


def _located(overlaps_N: Tensor) -> dict[str, float]:
    if not len(overlaps_N):
        return {}
    shares = {f"located_iou{100 * least:.0f}": float((overlaps_N >= least).double().mean()) for least in OVERLAPS}
    return shares | {"boxes_measured": float(len(overlaps_N))}


def strongest(found: Sequence[MapBoxes], most: int) -> Tensor:
    """(B, most, 4) the boxes of the finding that has the best one of each image; NaN where there are fewer."""
    kept = torch.full((len(found), most, 4), torch.nan)
    for i, boxed in enumerate(found):
        if len(boxed):
            own = boxed.boxes_N4[boxed.index_N == boxed.index_N[boxed.score_N.argmax()]]
            kept[i, : len(own)] = torch.from_numpy(own)
    return kept


def framed(x_B1HW: Tensor, boxes_BN4: Tensor) -> Tensor:
    """Images (B, H, W) in [0, 1] with the outlines of boxes given as shares, two pixels wide."""
    side = x_B1HW.shape[-1]
    at = torch.arange(side, device=x_B1HW.device) + 0.5
    low, high = ((boxes_BN4 * side)[..., part, None] for part in (slice(0, 2), slice(2, 4)))
    whole, inner = ((at > low + rim) & (at < high - rim) for rim in (0, 2))
    outline = (_filled(whole) & ~_filled(inner)).any(1)
    return torch.where(outline, 1 - 0.5 * x_B1HW[:, 0].round(), x_B1HW[:, 0])


def _filled(spans_BN2S: Tensor) -> Tensor:
    return spans_BN2S[:, :, 1, :, None] & spans_BN2S[:, :, 0, None, :]
