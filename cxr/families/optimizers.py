"""Optimizers and schedules for one stage of training: AdamW with a cosine, and YOLO's that decay linearly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]  # of a value, after so many moves of the weights
_NORMS = tuple(kind for name, kind in vars(nn).items() if "Norm" in name and isinstance(kind, type))


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, *, fused: bool) -> AdamW:
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def warmup_cosine(optimizer: Optimizer, warmup: float, moves: int) -> LambdaLR:
    """The learning rate rises linearly over the share `warmup` of all moves, then falls along a cosine to 0."""
    rise = max(1, round(warmup * moves))

    def factor(move: int) -> float:
        if move < rise:
            return (move + 1) / rise
        progress = min(1.0, (move - rise) / max(1, moves - rise))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def grouped_sgd(network: nn.Module, lr: float, weight_decay: float, momentum: float) -> SGD:
    """SGD with Nesterov's momentum, of parameters grouped as Ultralytics' trainer does; see `_groups`."""
    return SGD(_groups(network, weight_decay), lr=lr, momentum=momentum, weight_decay=0.0, nesterov=True)


def grouped_adamw(network: nn.Module, lr: float, weight_decay: float, momentum: float, *, fused: bool) -> AdamW:
    """AdamW of the same groups, `momentum` as the first beta."""
    betas = momentum, 0.999
    return AdamW(_groups(network, weight_decay), lr=lr, betas=betas, weight_decay=0.0, fused=fused)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, norms' weights, biases; only the first decay. Parameters that require no gradient are left out."""
    weights, norms, biases = [], [], []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = biases if "bias" in name else norms if isinstance(module, _NORMS) else weights
            group += [parameter] * parameter.requires_grad
    return [{"params": weights, "weight_decay": weight_decay}, {"params": norms}, {"params": biases}]


@dataclass(frozen=True)
class LinearDecay:
    """Ultralytics' schedule: from epoch to epoch the learning rate falls evenly, to the share `last` of its peak.

    In the first `warmup` moves the biases' rate falls from `bias_lr`, all others' rises from 0, and SGD's momentum
    rises from `first_momentum`.

    Args:
        epochs: of the stage, each of `moves_an_epoch`.
    """

    epochs: int
    moves_an_epoch: int
    warmup: int
    last: float
    bias_lr: float
    first_momentum: float

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """For an optimizer of `grouped_sgd` or `grouped_adamw`."""
        *others, biases = optimizer.param_groups
        factors = [self._factor(0.0)] * len(others) + [self._factor(self.bias_lr / biases["lr"])]
        if isinstance(optimizer, SGD):
            return WithMomentum(optimizer, factors, self._momentum(biases["momentum"]))
        return LambdaLR(optimizer, factors)

    def _factor(self, first: float) -> Factor:
        def factor(move: int) -> float:
            done = min(move // self.moves_an_epoch, self.epochs) / self.epochs
            plain = (1 - done) * (1 - self.last) + self.last
            return first + (plain - first) * move / self.warmup if move < self.warmup else plain

        return factor

    def _momentum(self, peak: float) -> Factor:
        def momentum(move: int) -> float:
            return self.first_momentum + (peak - self.first_momentum) * min(1.0, move / max(1, self.warmup))

        return momentum


class WithMomentum(LambdaLR):
    """A LambdaLR that also sets the momentum of all groups."""

    def __init__(self, optimizer: Optimizer, factors: Sequence[Factor], momentum: Factor) -> None:
        self._momentum = momentum
        super().__init__(optimizer, list(factors))

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            group["momentum"] = self._momentum(self.last_epoch)
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "_momentum"}
