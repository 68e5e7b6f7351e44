"""Optimizers and learning rate schedules: AdamW with a cosine or linear schedule, and those of Ultralytics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]  # of a value, after this many updates
_NORMS = tuple(kind for name, kind in vars(nn).items() if "Norm" in name and isinstance(kind, type))


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, *, fused: bool) -> AdamW:
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def warmup_cosine(optimizer: Optimizer, warmup: float, updates: int) -> LambdaLR:
    """The learning rate rises linearly over the fraction `warmup` of all updates, then follows a cosine down to 0."""
    rise = max(1, round(warmup * updates))

    def factor(update: int) -> float:
        if update < rise:
            return (update + 1) / rise
        progress = min(1.0, (update - rise) / max(1, updates - rise))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def linear(optimizer: Optimizer, updates: int) -> LambdaLR:
    """The learning rate falls linearly from its peak to 0, without a warmup."""
    return LambdaLR(optimizer, lambda update: max(0.0, 1 - update / updates))


def grouped_sgd(network: nn.Module, lr: float, weight_decay: float, momentum: float) -> SGD:
    """SGD with Nesterov momentum, with parameters grouped as in Ultralytics' trainer; see `_groups`."""
    return SGD(_groups(network, weight_decay), lr=lr, momentum=momentum, weight_decay=0.0, nesterov=True)


def grouped_adamw(network: nn.Module, lr: float, weight_decay: float, momentum: float, *, fused: bool) -> AdamW:
    """AdamW with the same groups and `momentum` as its first beta."""
    betas = momentum, 0.999
    return AdamW(_groups(network, weight_decay), lr=lr, betas=betas, weight_decay=0.0, fused=fused)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, weights of norms, and biases; only the first group decays. Frozen parameters are omitted."""
    weights, norms, biases = [], [], []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = biases if "bias" in name else norms if isinstance(module, _NORMS) else weights
            group += [parameter] * parameter.requires_grad
    return [{"params": weights, "weight_decay": weight_decay}, {"params": norms}, {"params": biases}]


@dataclass(frozen=True)
class LinearDecay:
    """Ultralytics' schedule: from epoch to epoch the learning rate falls linearly to `final_fraction` of its peak.

    In the first `warmup` updates, the learning rate of biases falls from `bias_lr`, that of all other parameters
    rises from 0, and SGD's momentum rises from `first_momentum`.

    Args:
        epochs: number of epochs of the stage, each with `updates_per_epoch` updates.
    """

    epochs: int
    updates_per_epoch: int
    warmup: int
    final_fraction: float
    bias_lr: float
    first_momentum: float

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule of an optimizer made by `grouped_sgd` or `grouped_adamw`."""
        *others, biases = optimizer.param_groups
        factors = [self._factor(0.0)] * len(others) + [self._factor(self.bias_lr / biases["lr"])]
        if isinstance(optimizer, SGD):
            return WithMomentum(optimizer, factors, self._momentum(biases["momentum"]))
        return LambdaLR(optimizer, factors)

    def _factor(self, first: float) -> Factor:
        def factor(update: int) -> float:
            progress = min(update // self.updates_per_epoch, self.epochs) / self.epochs
            plain = (1 - progress) * (1 - self.final_fraction) + self.final_fraction
            return first + (plain - first) * update / self.warmup if update < self.warmup else plain

        return factor

    def _momentum(self, peak: float) -> Factor:
        def momentum(update: int) -> float:
            return self.first_momentum + (peak - self.first_momentum) * min(1.0, update / max(1, self.warmup))

        return momentum


class WithMomentum(LambdaLR):
    """A LambdaLR that also sets the momentum of all parameter groups."""

    def __init__(self, optimizer: Optimizer, factors: Sequence[Factor], momentum: Factor) -> None:
        self._momentum = momentum
        super().__init__(optimizer, list(factors))

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            group["momentum"] = self._momentum(self.last_epoch)
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "_momentum"}
