"""Batch norm on several workers: statistics of all their images if possible, otherwise a note in the log."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

FEW = 16  # images: with fewer, batch norm's error grows quickly (Wu & He 2018, arXiv 1803.08494, figure 1)


def synchronized(network: nn.Module) -> nn.Module:
    """The network with SyncBatchNorm in place of its batch norms, for GPUs; parameters and names stay the same.

    Layers that are not in training mode, such as those of a frozen backbone, keep using their running statistics.
    """
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def note(network: nn.Module, workers: int, images: int, device: torch.device) -> str:
    """A note for the user if batch norms see only a part of a step's images, otherwise empty.

    Args:
        images: of each worker in a step.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    apart = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm) and not _frozen(norm)]
    if workers == 1 or not apart:
        return ""
    why = "because only GPUs can share them" if device.type == "cpu" else "because sync_batch_norm is off"
    thin = f" With fewer than {FEW} images, results get worse: use fewer workers or a larger batch_size." * (
        images < FEW
    )
    return (
        f"batch norm: each of the {workers} workers computes its own statistics over {images} of the "
        f"{workers * images} images of a step, {why}. The result therefore depends on the number of workers.{thin}"
    )


def _frozen(norm: nn.Module) -> bool:
    parameters = list(norm.parameters())
    return bool(parameters) and not any(values.requires_grad for values in parameters)
