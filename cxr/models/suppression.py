"""Non-maximum suppression as one operation on tensors of fixed shapes, which an exporter can translate."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("cxr::suppress", mutates_args=())
def suppress(boxes_BA4: Tensor, scores_BFA: Tensor, iou: float, min_score: float, max_boxes: int) -> Tensor:
    """The scores (B, F, A) of the boxes that remain after suppression per image and finding; 0 for all others.

    Args:
        boxes_BA4: x_min, y_min, x_max, y_max, the same for all findings.
        iou: of two boxes of a finding that overlap more than this, the one with the lower score is dropped.
        min_score: boxes whose score is not above this are dropped.
        max_boxes: maximum number of boxes that remain per image and finding: those with the highest scores.
    """
    from torchvision.ops import nms  # imported here because it takes seconds

    remaining = torch.zeros_like(scores_BFA)
    for boxes_A4, scores_FA, remaining_FA in zip(boxes_BA4, scores_BFA, remaining, strict=True):
        for scores_A, remaining_A in zip(scores_FA, remaining_FA, strict=True):
            index = (scores_A > min_score).nonzero()[:, 0]
            index = index[nms(boxes_A4[index], scores_A[index], iou)[:max_boxes]]
            remaining_A[index] = scores_A[index]
    return remaining


@suppress.register_fake
def _(boxes_BA4: Tensor, scores_BFA: Tensor, iou: float, min_score: float, max_boxes: int) -> Tensor:
    return torch.empty_like(scores_BFA)


def best_boxes(boxes_BA4: Tensor, remaining_BFA: Tensor, max_boxes: int) -> Tensor:
    """(B, max_boxes, 6) boxes, scores and findings' indices of what remains, best first, padded with NaN."""
    findings, anchors = remaining_BFA.shape[1:]
    scores_BK, index_BK = remaining_BFA.flatten(1).topk(min(max_boxes, findings * anchors))
    anchor_BK, finding_BK = index_BK % anchors, index_BK // anchors
    boxes_BK4 = boxes_BA4.gather(1, anchor_BK[..., None].expand(-1, -1, 4))
    rows = torch.cat([boxes_BK4, scores_BK[..., None], finding_BK[..., None].to(boxes_BK4.dtype)], 2)
    rows = torch.where(scores_BK[..., None] > 0, rows, torch.nan)
    return torch.nn.functional.pad(rows, (0, 0, 0, max_boxes - rows.shape[1]), value=torch.nan)
