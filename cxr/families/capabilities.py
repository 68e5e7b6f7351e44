"""Capabilities that only some families have, as protocols: a recipe has one if it defines the members.

Callers ask with `isinstance`, or with a function of this module that raises a message for the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import optimizers
from cxr.families.base import Communicator, Recipe, Stage, Task
from cxr.schema import PixelFormat


@runtime_checkable
class LatentEncoder(Protocol):
    """A recipe whose network compresses images to latents that an archive can store and that can be scored."""

    def latent_format(self) -> PixelFormat:
        """Size and bits of the latents that `encode` returns.

        Raises:
            UserError: an archive cannot store latents of this size.
        """
        ...

    def encode(self, network: nn.Module, batch: Batch) -> Tensor:
        """A batch's latents as they are stored: uint8 or uint16, (B, h, h). Called in inference mode."""
        ...

    def encoder_state(self, network: nn.Module) -> dict[str, Tensor]:
        """All tensors that determine what `encode` returns; two networks with equal ones give equal latents."""
        ...

    def predict_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`Recipe.predict` for a batch whose pixels are latents from `encode`."""
        ...

    def render_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`Recipe.render` for a batch whose pixels are latents from `encode`."""
        ...


def latent_encoder(recipe: Recipe) -> LatentEncoder:
    """The recipe as a `LatentEncoder`.

    Raises:
        UserError: the family does not compress images.
    """
    if isinstance(recipe, LatentEncoder):
        return recipe
    raise UserError(f"family {recipe.family!r} has no latents: use a checkpoint of a family that compresses images")


@runtime_checkable
class Embedder(Protocol):
    """A recipe whose network describes an image by one vector."""

    def embed(self, network: nn.Module, batch: Batch) -> Tensor:
        """The vectors of a batch, float32 (B, D). Called in inference mode."""
        ...

    def predict_and_embed(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What `predict` and `embed` return, from one pass through the network. Called in inference mode."""
        ...


def embedder(recipe: object) -> Embedder:
    """`recipe`, which must be able to embed images.

    Raises:
        UserError: the family has no embeddings.
    """
    if isinstance(recipe, Embedder):
        return recipe
    family = getattr(recipe, "family", "")
    raise UserError(
        f"expected a checkpoint of a family with embeddings, such as classify: family {family!r} has no embeddings"
    )


@runtime_checkable
class HeatMaps(Protocol):
    """A recipe whose network shows where in an image the evidence for each finding is."""

    def heat_maps(self, network: nn.Module, batch: Batch) -> Tensor:
        """Maps (B, F, h, w) in [0, 1], float32, of the checkpoint's findings; each covers the network's input.

        h and w may be smaller than the input. Called in inference mode, on a network whose parameters were made
        outside of it.
        """
        ...


@runtime_checkable
class MaskProbabilities(Protocol):
    """A recipe whose network segments one kind of mask."""

    @property
    def mask_label(self) -> str:
        """What the mask shows."""
        ...

    def mask_probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        """The probability of each pixel of the network's input that it belongs to the mask: (B, h, w) in [0, 1].
        Called in inference mode."""
        ...


@runtime_checkable
class SharedPretraining(Protocol):
    """A recipe with a network that is trained once and then shared by all its training runs."""

    @property
    def is_pretrained(self) -> bool:
        """Whether the shared network is there already, so that `pretrain_shared` has nothing to do."""
        ...

    def pretrain_shared(self, out: str) -> Self:
        """Train the shared network into OUT, or reuse the one an earlier call left there; returns the new recipe.

        Called once, on the same kind of device as a worker's; `training.shared_pretraining` does this on the cluster.
        """
        ...


@runtime_checkable
class CustomOptimizer(Protocol):
    """A recipe with its own optimizer and schedule, instead of `AdamWWithCosine`."""

    @property
    def loss_scale(self) -> float:
        """Factor applied to the total loss before backward; `clip` applies to the scaled gradients."""
        ...

    @property
    def ema_ramp(self) -> float:
        """Number of updates over which the decay of the moving average rises: after n updates it is
        ema · (1 − exp(−n / ema_ramp)). 0: as `Recipe.ema` says."""
        ...

    def make_optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        """A new optimizer of the task's trainable parameters for one stage."""
        ...

    def make_schedule(self, optimizer: Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        """A schedule of one stage; the engine steps it after every update of the weights."""
        ...


class AdamWWithCosine:
    """The optimizer of recipes without their own: AdamW with a linear warmup and a cosine decay."""

    loss_scale, ema_ramp = 1.0, 0.0

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def make_optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]
        return optimizers.adamw(trainable, stage.lr, self.recipe.weight_decay, fused=fused)

    def make_schedule(self, optimizer: Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        return optimizers.warmup_cosine(optimizer, self.recipe.warmup, stage.epochs * updates_per_epoch)


def optimization(recipe: Recipe) -> CustomOptimizer:
    """The recipe's own optimizer and schedule, or the default."""
    return recipe if isinstance(recipe, CustomOptimizer) else AdamWWithCosine(recipe)


@runtime_checkable
class PositiveSampling(Protocol):
    """A recipe that chooses the fraction of positive images in each epoch."""

    @property
    def sampled_finding(self) -> str:
        """A finding of the archive, or `schema.ANY_FINDING`: which images are positive."""
        ...

    def positive_fraction_of(self, epoch: int) -> float | None:
        """Fraction of positive images in the epoch with this index, from 0. None: images as they are in the archive.

        None in all epochs or in none. All epochs have the same length; see `cxr.data.sampling.Sampling`.
        """
        ...


@runtime_checkable
class DegeneracyCheck(Protocol):
    """A recipe whose networks can reach a good metric with a useless solution."""

    def degenerate_reason(self, metrics: Mapping[str, float]) -> str:
        """Why a network with these validation metrics must not be ranked, however good they are; empty if it may."""
        ...


@runtime_checkable
class BatchLookahead(Protocol):
    """A task that sees batches before their step, for example to combine images of several steps."""

    def look_ahead(self, batches: Iterator[Batch], skipped: int = 0) -> Iterator[Batch]:
        """The batches of an epoch but the first `skipped`, on the task's device, in the same order."""
        ...

    def batches_before(self, rows: int) -> int:
        """How many batches of `rows` images before a step it may depend on, in any epoch."""
        ...


@runtime_checkable
class RawEvaluation(Protocol):
    """What evaluates raw predictions, see `Combinable`: the family's task, or a part of it."""

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        """Metrics of the raw predictions for each batch of this worker's validation images.

        Also chooses the network's thresholds, if it has any. The same values on every worker.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The chosen thresholds, as `Task.describe` returns them."""
        ...


@runtime_checkable
class Combinable(Protocol):
    """A recipe whose networks can form an ensemble (`cxr.families.ensemble`).

    Its `predict` consists of two steps, `decide(raw_predictions(network, batch), network)`, of which only the second
    uses thresholds. An ensemble combines its members' raw predictions, and then decides by its own thresholds.
    """

    decision_buffers: ClassVar[tuple[str, ...]]
    """Names of the network's buffers that `decide` reads."""

    def shared_settings(self) -> tuple[str, ...]:
        """Settings that must be equal in all members, in addition to those of how images are stored.

        Raises:
            UserError: networks of this recipe predict nothing that could be combined.
        """
        ...

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Predictions before thresholds, as tensors whose first axis is B. Called in inference mode."""
        ...

    def combine(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The raw predictions of an ensemble, from those of its members for the same batch."""
        ...

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """What `Recipe.predict` returns. Reads only `decision_buffers` and `findings` of the network."""
        ...

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Pictures of raw predictions, as `Recipe.render` returns them."""
        ...

    def raw_evaluation(self, network: nn.Module) -> RawEvaluation:
        """Evaluates raw predictions. Writes thresholds into the `decision_buffers` of the network."""
        ...


def combinable(recipe: Recipe) -> Combinable:
    """The recipe as a `Combinable`.

    Raises:
        UserError: networks of this family cannot form an ensemble.
    """
    if isinstance(recipe, Combinable):
        return recipe
    raise UserError(
        f"networks of family {recipe.family!r} cannot form an ensemble, because their outputs cannot be combined: "
        f"train a single network (--members 1)"
    )


def mean_predictions(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over the members, in float32; means of integers are rounded."""
    means = {name: torch.stack([raw[name].float() for raw in members]).mean(0) for name in members[0]}
    return {
        name: mean if members[0][name].is_floating_point() else mean.round().to(members[0][name].dtype)
        for name, mean in means.items()
    }
