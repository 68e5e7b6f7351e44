"""Affine transforms fitted to the masks themselves: the upper bound for any aligner's overlap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.metrics.alignment import centered, iou_matrix, off_diagonal_mean
from cxr.models.spatial_transformer import warp

SIZE = 64  # height and width in pixels of the masks that are fitted
STEPS = 150
STEP = 0.01  # initial learning rate of Adam


def align_masks(masks_BHW: Tensor, steps: int = STEPS) -> Tensor:
    """Transforms (B, 2, 3), mean removed, that maximize the mean pairwise IoU of bool masks.

    Starts from transforms that give all masks the same center and covariance, and maximizes the mean pairwise IoU of
    soft masks with Adam. The mean transform is removed before each step, so that zooming in does not raise the IoU.
    The result is a local optimum.
    """
    soft_B1HW = F.interpolate(masks_BHW[:, None].float(), (SIZE, SIZE), mode="area")
    free = same_moments(soft_B1HW).requires_grad_()
    optimizer = torch.optim.Adam([free], STEP)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        theta = centered(free, free.mean(0, keepdim=True))
        loss = -off_diagonal_mean(iou_matrix(warp(soft_B1HW, theta)[:, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    theta = free.detach()
    return centered(theta, theta.mean(0, keepdim=True))


def same_moments(soft_B1HW: Tensor) -> Tensor:
    """Transforms (B, 2, 3) that give masks in [0, 1] one center and one covariance, without rotating them."""
    center, covariance = _moments(soft_B1HW)
    square_root = _square_root(covariance)
    linear = square_root @ torch.linalg.inv(_square_root(covariance.mean(0, keepdim=True)))
    shift = center - (linear @ center.mean(0)[:, None])[..., 0]
    return torch.cat([linear, shift[..., None]], -1).float()


def _moments(soft_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Centers (B, 2) and covariances (B, 2, 2), float64, on axes from −1 to 1; those of a square if empty."""
    mass = soft_B1HW.flatten(1).double()
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, torch.ones_like(mass))
    axis = (2 * torch.arange(soft_B1HW.shape[-1], dtype=torch.float64) + 1) / soft_B1HW.shape[-1] - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    weight = mass / mass.sum(1, keepdim=True)
    center = weight @ points
    offset = points[None] - center[:, None]
    covariance = torch.einsum("bp,bpi,bpj->bij", weight, offset, offset)
    return center, covariance + 1e-4 * torch.eye(2, dtype=torch.float64)


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square roots (B, 2, 2)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
