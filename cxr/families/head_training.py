"""Training the head of a classifier on stored embeddings, and searching its settings, in one process.

The backbone is left as it is. Its embeddings are computed once per image, so that an epoch of a head takes seconds
where one of the network takes hours, and a search needs no cluster.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn
from torch.nn import functional

from cxr import schema
from cxr.errors import UserError
from cxr.families import optimizers
from cxr.families.classifier_base import positive_class_weights
from cxr.families.classify import ClassifyRecipe
from cxr.metrics import classification
from cxr.models.image_classifier import POOLED_HEADS, POSITION_HEADS, ImageClassifier, classification_layers

SETTINGS = (
    *("epochs", "batch_size", "lr", "weight_decay", "warmup", "clip", "seed"),
    *("head", "loss", "focal_gamma", "gamma_positive", "gamma_negative", "margin", "pos_weight_power"),
)
"""Settings of a recipe that a head is trained with; the others are those of the network that made the embeddings."""
SCALED_BY = 20_000  # images from which the mean and the standard deviation of each feature are estimated
CONSTANT = 1e-6  # standard deviation below which a feature counts as constant
EVALUATED = 65_536  # images per forward pass in evaluation
RANKED_BY = 10_000  # validation images by which a search compares trials before the end
RUNGS = (1, 3, 9, 27)  # of 27 parts of a trial's steps: when it may be stopped
SEARCH_STEPS = 540  # maximum number of steps of a trial; the best one's settings are trained for all their epochs


@dataclass(frozen=True)
class LabeledEmbeddings:
    """Embeddings in memory, and the rows that have labels."""

    vectors: Tensor
    """(N, D) float16."""
    labels: Tensor
    """(N, F) int8: 1, 0 or −1 (unknown)."""
    train: Tensor
    """Rows to train on, int64."""
    val: Tensor
    """Rows to validate on, int64."""

    def to(self, device: torch.device) -> LabeledEmbeddings:
        return LabeledEmbeddings(
            self.vectors.to(device), self.labels.to(device), self.train.to(device), self.val.to(device)
        )

    @functools.cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(D,) mean and standard deviation of each feature in training images.

        The deviation of a constant feature is infinite, so that heads ignore it: any other value, in a later image,
        would otherwise be millions of deviations away.
        """
        step = max(1, len(self.train) // SCALED_BY)
        x_ND = self.vectors[self.train[::step]].float()
        std_D = x_ND.std(0, correction=0)
        return x_ND.mean(0), std_D.masked_fill(std_D < CONSTANT, torch.inf)

    @functools.cached_property
    def label_counts(self) -> Tensor:
        """(2, F) numbers of negative and positive training images of each finding, at least 1."""
        labels_NF = self.labels[self.train]
        counts = [(labels_NF == value).sum(0) for value in (schema.NEGATIVE, schema.POSITIVE)]
        return torch.stack(counts).clamp(min=1).float()


def starting_recipe(base: ClassifyRecipe) -> ClassifyRecipe:
    """The settings of a head by default, for a checkpoint of recipe `base`.

    Raises:
        UserError: its embeddings are not what its head classifies.
    """
    if base.head in POSITION_HEADS:
        raise UserError(
            f"expected embeddings of a checkpoint with the head linear, mlp or attention, got head={base.head}, "
            f"which classifies positions: score with another checkpoint"
        )
    return base.replace(
        head="linear" if base.head in POOLED_HEADS else base.head,
        epochs=10,
        head_epochs=0,
        batch_size=1024,
        accumulate=1,
        lr=1e-3,
        weight_decay=1e-2,
        loss="bce",
        pos_weight_power=0.0,
        ema=0.0,
        patience=0,
        folds=0,
        fold=None,
        mixup=0.0,
        tta_flip=False,  # embeddings are those of the image alone
    )


def check_settings(recipe: ClassifyRecipe, base: ClassifyRecipe) -> None:
    """Raise UserError if `recipe` would change the network that made the embeddings."""
    start = starting_recipe(base)
    changed = recipe.changes_from(start.to_dict(), free=SETTINGS)
    if changed:
        raise UserError(
            f"only the head is trained on embeddings, but other settings differ from those of the network that made "
            f"them ({'; '.join(changed)}): omit them"
        )
    heads = search_space(start).get("head", CategoricalDistribution([start.head]))
    if recipe.head not in getattr(heads, "choices", ()):
        raise UserError(
            f"head={recipe.head}: expected {' or '.join(getattr(heads, 'choices', ()))} on embeddings of a network "
            f"with the head {base.head}"
        )


def search_space(recipe: ClassifyRecipe) -> dict[str, BaseDistribution]:
    """Settings of a head that are worth searching."""
    space: dict[str, BaseDistribution] = {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "weight_decay": FloatDistribution(1e-4, 1.0, log=True),
        "loss": CategoricalDistribution(["bce", "focal", "asymmetric"]),
        "pos_weight_power": FloatDistribution(0, 1),
    }
    return space | ({"head": CategoricalDistribution(list(POOLED_HEADS))} if recipe.head in POOLED_HEADS else {})


class HeadTraining:
    """A head in training with AdamW, on features that are scaled to mean 0 and variance 1.

    Args:
        steps: number of steps until the learning rate is 0.
    """

    def __init__(self, recipe: ClassifyRecipe, data: LabeledEmbeddings, steps: int) -> None:
        self.recipe, self.data = recipe, data
        self._random = torch.Generator().manual_seed(recipe.seed)
        device, width, findings = data.vectors.device, data.vectors.shape[1], data.labels.shape[1]
        self.head = classification_layers(recipe.head, width, findings)
        self._initialize()
        self.head.to(device)
        self.class_weight_2F = positive_class_weights(data.label_counts, recipe.pos_weight_power)
        decays, others = ([p for p in self.head.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        self._schedule = optimizers.warmup_cosine(self._optimizer, recipe.warmup, steps)
        self._rows = data.train[:0]  # those of the current epoch that are left

    def _initialize(self) -> None:
        """The last layer is 0 and others are random, from a generator of their own: threads share the global one."""
        *hidden, last = (layer for layer in self.head.modules() if isinstance(layer, nn.Linear))
        for layer in hidden:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=self._random)
        for parameter in (last.weight, *(layer.bias for layer in (*hidden, last))):
            nn.init.zeros_(parameter)

    def advance(self, steps: int) -> None:
        """Train for so many steps more."""
        for _ in range(steps):
            rows = self._next_rows()
            logits_BF = self._logits(self.data.vectors.index_select(0, rows).float())
            loss = self.recipe.loss_of(logits_BF, self.data.labels[rows], self.class_weight_2F)
            self._optimizer.zero_grad()
            loss.backward()
            if self.recipe.clip:
                nn.utils.clip_grad_norm_(self.head.parameters(), self.recipe.clip)
            self._optimizer.step()
            self._schedule.step()

    def _next_rows(self) -> Tensor:
        if not len(self._rows):
            order = torch.randperm(len(self.data.train), generator=self._random)
            self._rows = self.data.train[order.to(self.data.train.device)]
        rows, self._rows = self._rows.split_with_sizes(self._shares())
        return rows

    def _shares(self) -> list[int]:
        first = min(self.recipe.batch_size, len(self._rows))
        return [first, len(self._rows) - first]

    def _logits(self, x_BD: Tensor) -> Tensor:
        """The head's output for unscaled features: scaling the first layer instead of each batch halves the time."""
        first, *others = self.head if isinstance(self.head, nn.Sequential) else [self.head]
        x = functional.linear(x_BD, *self._unscaled(first))
        for layer in others:
            x = layer(x)
        return x

    def _unscaled(self, first: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight and bias that do to unscaled features what the first layer does to scaled ones."""
        mean_D, std_D = self.data.scale
        weight = first.get_parameter("weight") / std_D
        return weight, first.get_parameter("bias") - weight @ mean_D

    @torch.inference_mode()
    def probabilities(self, rows: Tensor) -> Tensor:
        """(R, F) float32."""
        x_ND = self.data.vectors
        return torch.cat(
            [self._logits(x_ND.index_select(0, some).float()).sigmoid() for some in rows.split(EVALUATED)]
        )

    def mean_auroc(self, rows: Tensor) -> float:
        """Mean AUROC of the findings with both classes among these rows; NaN if there is none."""
        p_RF, labels_RF = self.probabilities(rows).cpu().numpy(), self.data.labels[rows].cpu().numpy()
        auroc_F = classification.auroc(p_RF, labels_RF)
        return float(np.nanmean(auroc_F)) if np.isfinite(auroc_F).any() else float("nan")

    @torch.no_grad()
    def finished(self) -> nn.Module:
        """The head for features as the network makes them, with their scale in its first layer; on the CPU."""
        first = next(layer for layer in self.head.modules() if isinstance(layer, nn.Linear))
        for parameter, values in zip((first.weight, first.bias), self._unscaled(first), strict=True):
            parameter.copy_(values)
        return self.head.cpu()


def total_steps(recipe: ClassifyRecipe, data: LabeledEmbeddings) -> int:
    return recipe.epochs * -(-len(data.train) // recipe.batch_size)


def train_head(recipe: ClassifyRecipe, data: LabeledEmbeddings) -> nn.Module:
    """A head trained for all epochs, to be attached to the network that made the embeddings."""
    steps = total_steps(recipe, data)
    training = HeadTraining(recipe, data, steps)
    training.advance(steps)
    return training.finished()


@dataclass(frozen=True)
class HeadTrial:
    """A trial of a search: its settings, the mean AUROC when it ended, and how many steps it had."""

    number: int
    sampled: dict[str, Any]
    value: float
    steps: int
    stopped_early: bool


def search_heads(
    recipe: ClassifyRecipe,
    data: LabeledEmbeddings,
    space: Mapping[str, BaseDistribution],
    *,
    trials: int,
    seed: int = 0,
    threads: int | None = None,
) -> list[HeadTrial]:
    """Search settings with TPE and asynchronous successive halving (Li et al. 2020); the best trial comes first.

    At 1/27, 1/9 and 1/3 of its steps, a trial ends unless it is in the best third by the AUROC on `RANKED_BY`
    validation images. Complete trials are compared on all of them. Trials share the embeddings and run in `threads`
    (default: one per core), so that their order, and with it the samples, differ from run to run unless there is one.
    """
    unit = max(1, min(total_steps(recipe, data), SEARCH_STEPS) // RUNGS[-1])
    some_val = data.val[:: max(1, len(data.val) // RANKED_BY)]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(20, trials), constant_liar=True)
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    optuna.logging.set_verbosity(quiet)
    _ = data.scale, data.label_counts  # threads share them

    def run(_: int) -> HeadTrial:
        trial = study.ask(dict(space))
        training = HeadTraining(recipe.replace(**trial.params), data, unit * RUNGS[-1])
        done, value = 0, float("nan")
        for rung in RUNGS:
            training.advance((rung - done) * unit)
            done, last = rung, rung == RUNGS[-1]
            value = training.mean_auroc(data.val if last else some_val)
            trial.report(value, rung)
            if not last and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                return HeadTrial(trial.number, trial.params, value, done * unit, True)
        study.tell(trial, value if np.isfinite(value) else None)
        return HeadTrial(trial.number, trial.params, value, done * unit, False)

    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # trials run side by side
    try:
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            ended = list(pool.map(run, range(trials)))
    finally:
        torch.set_num_threads(cores)
    return sorted(ended, key=lambda trial: (trial.stopped_early, -np.nan_to_num(trial.value, nan=-1.0)))


def attach(base: nn.Module, recipe: ClassifyRecipe, findings: tuple[str, ...], head: nn.Module) -> ImageClassifier:
    """A network with the backbone of `base` and another head, for these findings."""
    network = recipe.network(findings)
    network.load_state_dict(without_head(base), strict=False)
    network.head = head
    return network.eval()


def without_head(network: nn.Module) -> dict[str, Tensor]:
    """The state of a classifier without that of its head and its thresholds."""
    state = network.state_dict()
    return {name: values for name, values in state.items() if not name.startswith("head.") and name != "thresholds"}
