"""The loss of YOLO's anchor-free head: Ultralytics' v8DetectionLoss, with shapes that do not depend on values.

Ultralytics' code selects the assigned anchors (`nonzero`) and copies small constants to the device, for which the
host waits for the GPU 14 times per step. Here all pairs of anchors and boxes are computed, and unassigned pairs have
weight 0, so that the host never waits. Tests compare values and gradients with Ultralytics' own.

Boxes are assigned to anchors as in TOOD (Feng et al. 2021, arXiv 2108.07755): each box takes the 10 anchors inside it
with the largest p^.5 · CIoU^6. CIoU is by Zheng et al. (2020, arXiv 1911.08287), the distribution focal loss of box
edges by Li et al. (2020, arXiv 2006.04388).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TOP_K = 10  # anchors per box
_PAIRS = 1 << 24  # pairs of boxes and anchors that are compared in one operation
_EPS, _SMALL_EPS = 1e-7, 1e-9  # Ultralytics' values, to avoid division by 0


@dataclass(frozen=True)
class DetectionLoss:
    """Cross-entropy of findings, CIoU of boxes, and distribution focal loss of box edges.

    All three are divided by the sum of targets in the batch of all workers, so that the step does not depend on the
    number of workers. Ultralytics' trainer divides on each worker separately.

    Args:
        strides: distances between the anchors of each level in pixels, fine levels first; see `Yolo.strides`.
        box_weight, class_weight, dfl_weight: weights of the three terms.
        total: sums a scalar over all workers.
        workers: number of workers.
    """

    strides: Sequence[float]
    box_weight: float
    class_weight: float
    dfl_weight: float
    total: Callable[[Tensor], Tensor]
    workers: int

    def __call__(
        self, raw: Mapping[str, Any], boxes_BN5: Tensor, unknown_BR5: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss terms by name, float32. Their mean over workers is the loss of the whole batch.

        Args:
            raw: output of `Yolo` in training mode: "boxes" (B, 4 · bins, A), "scores" (B, K, A), and "feats", of
                which only the shapes are used.
            boxes_BN5: [index of the finding, x_min, y_min, x_max, y_max] as fractions of the image; NaN: no box.
            unknown_BR5: regions in which the presence of a finding is unknown, in the same form. Anchors there are
                not background for that finding; they count only if assigned to one of its boxes. Default: none.
        """
        scores_BAK = raw["scores"].float().transpose(1, 2)
        logits_BA4R = raw["boxes"].float().transpose(1, 2).unflatten(2, (4, -1))
        shapes = [feature.shape[-2:] for feature in raw["feats"]]
        cells_A2, stride_A1 = anchors(shapes, self.strides, scores_BAK.device)
        height, width = (side * self.strides[0] for side in shapes[0])
        log_BA4R, bins_R = logits_BA4R.log_softmax(-1), torch.arange(logits_BA4R.shape[-1], device=scores_BAK.device)
        predicted_BA4 = boxes_around(cells_A2, (log_BA4R.exp() * bins_R).sum(-1))

        truth_BN5 = in_pixels(boxes_BN5, width, height)
        target_BAK, target_px_BA4 = assign_in_parts(
            scores_BAK.detach().sigmoid(), predicted_BA4.detach() * stride_A1, cells_A2 * stride_A1, truth_BN5,
            min_side_px=self.strides[1] if len(self.strides) > 1 else self.strides[0],
        )  # fmt: skip
        target_BA4, weight_BA = target_px_BA4 / stride_A1, target_BAK.sum(-1)

        entropy_BAK = F.binary_cross_entropy_with_logits(scores_BAK, target_BAK, reduction="none")
        if unknown_BR5 is not None:
            unknown_BAK = covered(in_pixels(unknown_BR5, width, height), cells_A2 * stride_A1, entropy_BAK.shape[-1])
            entropy_BAK = entropy_BAK * (~unknown_BAK | (target_BAK > 0))
        sums = {
            "box": self.box_weight * ((1 - ciou(predicted_BA4, target_BA4)) * weight_BA).sum(),
            "class": self.class_weight * entropy_BAK.sum(),
            "dfl": self.dfl_weight * (edge_loss(log_BA4R, cells_A2, target_BA4) * weight_BA).sum(),
        }
        divisor = self.total(target_BAK.sum()).clamp(min=1) / self.workers
        return {name: value / divisor for name, value in sums.items()}


def in_pixels(boxes_BN5: Tensor, width: float, height: float) -> Tensor:
    """Rows of an index and a box, from fractions of the image to pixels, float32."""
    factors = (1, width, height, width, height)
    return torch.stack([v * f for v, f in zip(boxes_BN5.float().unbind(-1), factors, strict=True)], -1)


def covered(regions_BR5: Tensor, points_A2: Tensor, findings: int) -> Tensor:
    """(B, A, K) bool: whether each point lies in a region of each finding.

    Args:
        regions_BR5: [index of the finding, x_min, y_min, x_max, y_max]; NaN: no region.
        points_A2: x and y in the same unit.
    """
    regions_BR5 = without_unused(regions_BR5)
    images = max(1, _PAIRS // max(1, len(points_A2) * regions_BR5.shape[1]))
    parts = []
    for part_BR5 in regions_BR5.split(images):
        low, high = part_BR5[:, :, None, 1:3], part_BR5[:, :, None, 3:]
        inside_BRA = ((points_A2 >= low) & (points_A2 <= high)).all(-1)
        of_finding_BRK = part_BR5[..., :1] == torch.arange(findings, device=part_BR5.device)
        parts.append(torch.einsum("bra,brk->bak", inside_BRA.float(), of_finding_BRK.float()) > 0)
    return torch.cat(parts)


def without_unused(boxes_BN5: Tensor) -> Tensor:
    """On the CPU, drop columns without any box, except the first. On a GPU this would make the host wait."""
    if boxes_BN5.device.type != "cpu":
        return boxes_BN5
    used_N = ~boxes_BN5[..., 0].isnan().all(0)
    used_N[0] = True
    return boxes_BN5[:, used_N]


def anchors(shapes: Sequence[Sequence[int]], strides: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Anchors of all levels: x and y in cells of their level (A, 2), and the stride of the level (A, 1)."""
    points, pixels = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = (torch.arange(count, device=device, dtype=torch.float32) + 0.5 for count in (height, width))
        points.append(torch.stack([x.repeat(height), y[:, None].expand(-1, width).flatten()], -1))
        pixels.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(pixels)


def boxes_around(points_A2: Tensor, distances_BA4: Tensor) -> Tensor:
    """Boxes (B, A, 4) whose edges are at the given distances to the left, top, right and bottom of points."""
    left_top, right_bottom = distances_BA4.chunk(2, -1)
    return torch.cat([points_A2 - left_top, points_A2 + right_bottom], -1)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (…) of boxes (…, 4): IoU minus penalties for different centers and aspect ratios; broadcasts."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.unbind(-1), b.unbind(-1)
    a_wide, a_high, b_wide, b_high = ax1 - ax0, ay1 - ay0 + _EPS, bx1 - bx0, by1 - by0 + _EPS
    inside = (ax1.minimum(bx1) - ax0.maximum(bx0)).clamp(min=0) * (ay1.minimum(by1) - ay0.maximum(by0)).clamp(min=0)
    iou = inside / (a_wide * a_high + b_wide * b_high - inside + _EPS)
    diagonal = (ax1.maximum(bx1) - ax0.minimum(bx0)).square() + (ay1.maximum(by1) - ay0.minimum(by0)).square()
    apart = ((bx0 + bx1 - ax0 - ax1).square() + (by0 + by1 - ay0 - ay1).square()) / 4
    slant = (4 / math.pi**2) * (torch.atan(b_wide / b_high) - torch.atan(a_wide / a_high)).square()
    with torch.no_grad():
        much = slant / (1 - iou + slant + _EPS)
    return iou - (apart / (diagonal + _EPS) + slant * much)


def edge_loss(log_BA4R: Tensor, points_A2: Tensor, target_BA4: Tensor) -> Tensor:
    """(B, A) cross-entropy with the two bins nearest to each true edge's distance, mean over the four edges."""
    low, high = target_BA4.chunk(2, -1)
    distance = torch.cat([points_A2 - low, high - points_A2], -1).clamp(0, log_BA4R.shape[-1] - 1 - 0.01)
    left = distance.long()
    left_weight = left + 1 - distance
    log_left, log_right = (log_BA4R.gather(-1, bin_BA4[..., None])[..., 0] for bin_BA4 in (left, left + 1))
    return -(log_left * left_weight + log_right * (1 - left_weight)).mean(-1)


def assign_in_parts(
    scores_BAK: Tensor, predicted_BA4: Tensor, points_A2: Tensor, truth_BN5: Tensor, min_side_px: float
) -> tuple[Tensor, Tensor]:
    """`assign`, on parts of the batch, which limits memory."""
    truth_BN5 = without_unused(truth_BN5)
    images = max(1, _PAIRS // max(1, len(points_A2) * truth_BN5.shape[1]))
    parts = zip(scores_BAK.split(images), predicted_BA4.split(images), truth_BN5.split(images), strict=True)
    targets, boxes = zip(*(assign(p, boxes, points_A2, truth, min_side_px) for p, boxes, truth in parts), strict=True)
    return torch.cat(targets), torch.cat(boxes)


@torch.no_grad()
def assign(
    scores_BAK: Tensor, predicted_BA4: Tensor, points_A2: Tensor, truth_BN5: Tensor, min_side_px: float
) -> tuple[Tensor, Tensor]:
    """The target of each anchor: scores (B, A, K), 0 for background, and a box (B, A, 4). All boxes are in pixels.

    Args:
        scores_BAK, predicted_BA4: probabilities and boxes predicted by the network.
        truth_BN5: index of the finding and ground-truth box; NaN or zero area: no box.
        min_side_px: boxes with smaller sides may take the anchors of a box with this side.
    """
    label_BN, true_BN4 = truth_BN5[..., 0].nan_to_num(0).long(), truth_BN5[..., 1:].nan_to_num(0)
    low_BN2, high_BN2 = true_BN4.chunk(2, -1)
    center_BN2, half_BN2 = (low_BN2 + high_BN2) / 2, (high_BN2 - low_BN2).clamp(min=min_side_px) / 2
    candidate_BNA = ((high_BN2 > low_BN2).all(-1) & ~truth_BN5[..., 0].isnan())[..., None]
    for at_A, center_BN, half_BN in zip(
        points_A2.unbind(-1), center_BN2.unbind(-1), half_BN2.unbind(-1), strict=True
    ):
        candidate_BNA = candidate_BNA & (at_A - (center_BN - half_BN)[..., None] > _SMALL_EPS)
        candidate_BNA = candidate_BNA & ((center_BN + half_BN)[..., None] - at_A > _SMALL_EPS)

    overlap_BNA = ciou(true_BN4[:, :, None], predicted_BA4[:, None]).clamp(min=0) * candidate_BNA
    score_BNA = scores_BAK.transpose(1, 2).gather(1, label_BN[..., None].expand(-1, -1, len(points_A2)))
    fit_BNA = score_BNA.sqrt() * (overlap_BNA.square() * overlap_BNA).square()

    best = fit_BNA.topk(min(TOP_K, len(points_A2)), -1).indices
    taken_BNA = torch.zeros_like(candidate_BNA).scatter_(-1, best, True) & candidate_BNA
    nearest = torch.zeros_like(taken_BNA).scatter_(1, overlap_BNA.argmax(1, keepdim=True), True)
    taken_BNA = torch.where(taken_BNA.sum(1, keepdim=True) > 1, nearest, taken_BNA)  # an anchor has at most one box

    fit_BNA, overlap_BNA = fit_BNA * taken_BNA, overlap_BNA * taken_BNA
    strength_BNA = fit_BNA * overlap_BNA.amax(-1, keepdim=True) / (fit_BNA.amax(-1, keepdim=True) + _SMALL_EPS)
    which_BA = taken_BNA.int().argmax(1)
    target_BAK = torch.zeros_like(scores_BAK)
    target_BAK.scatter_(-1, label_BN.gather(1, which_BA)[..., None], strength_BNA.amax(1)[..., None])
    return target_BAK, true_BN4.gather(1, which_BA[..., None].expand(-1, -1, 4))
