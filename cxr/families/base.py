"""What every family gives the chain: a Recipe (settings, network, scores) and a Task (losses, metrics).

`train`, `tune` and `score` know only this file. No Ray here: a task can be trained in a bare torch loop.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, final

import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cxr import schema
from cxr.data.batch import Batch, to_arrow
from cxr.errors import UserError
from cxr.families import optimizers
from cxr.imaging.enhance import Denoise, Enhancement, Equalize, Normalize
from cxr.imaging.lung_bbox import MARGIN
from cxr.models import pretrained
from cxr.models.pretrained import Weights
from cxr.precision import outside_autocast
from cxr.schema import PixelFormat

Batches = Callable[[], Iterator[Batch]]  # each call is one pass over this worker's share


class Communicator(Protocol):
    """The group that trains together. Every member must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum(self, values: Tensor) -> Tensor:
        """Sum of one tensor a worker, the same shape on all."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all workers, concatenated along the first axis; lengths may differ."""
        ...

    def all_rows(self, rows: Tensor) -> Tensor:
        """Rows of all workers, as many of each, by rank: `rows` stands at `rank * len(rows)`.

        For training steps: it does not wait for the device, and gradients go back to the workers that gave the rows.
        """
        ...


class SingleProcess:
    """A group of one."""

    rank, size = 0, 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def all_rows(self, rows: Tensor) -> Tensor:
        return rows


class Task(nn.Module):
    """A network together with the losses and metrics it is trained by.

    A training step calls `augment`, then `forward` on what it returns. `forward` gives the step's loss terms, already
    weighted; the loop minimizes their sum. Only `self.network` is kept for scoring; other state that training must
    resume with belongs in buffers.

    The loop averages losses and gradients over workers. What is not a sum over images, such as the distance of a
    batch's mean or the choice of another image, needs the rows of all (`workers.all_rows`): a worker's share may be a
    single image.

    Neither of the two should wait for the device: no `.item()`, no `if` on a tensor, no boolean indexing.
    """

    network: nn.Module
    workers: Communicator = SingleProcess()
    """Those that train together; the training loop sets it."""

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """An epoch's batches, on the device of the task, in the same order; a task may look at those to come."""
        return batches

    @final
    @torch.no_grad()
    def augment(self, batch: Batch) -> Batch:
        """The batch as one training step shows it, with the random variation of `augmented`.

        Runs on the batch's device, in train mode, once per step, outside any autocast: coordinates are float32.
        """
        with outside_autocast(next(iter(batch.values())).device):
            return self.augmented(batch)

    def augmented(self, batch: Batch) -> Batch:
        """What `augment` returns; a family overrides this. All that is random in a step belongs here.

        Returns a new batch and leaves the given one as it is, since a step may be repeated with the same batch.
        Pixels are float32 in [0, 1] if they were changed. Small random parameters come from PyTorch's generator for
        the CPU, so that a GPU draws the same, and are moved with `non_blocking=True`; noise of every pixel may be
        drawn on the device.
        """
        return batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms by name, scalars, of an augmented batch. Runs under autocast, in train mode.

        Geometry that has to be here is computed by functions of `cxr.precision`, or marked `in_float32`.
        """
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """Modules that a step calls, to be compiled where that is asked for."""
        return [self.network]

    def enter(self, stage: str) -> None:
        """Before each stage, and when resuming within one: let what is to learn require a gradient, nothing else."""

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Before the first step of a new run (not when resuming): statistics of the training images, say."""

    def end_epoch(self, workers: Communicator) -> None:
        """After each epoch's last step, before validation."""

    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `self.network` on all workers' validation images together; the same on every worker."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What a reader of a checkpoint should know of what the task has learnt, as JSON takes it."""
        return {}

    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """Write pictures that show what the network does, and what of the task is worth a file of its own."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training with an optimizer and a schedule of its own, in which other parts may learn."""

    name: str
    epochs: int
    lr: float
    echoes: int = 1
    """Steps on each batch, its augmentation drawn anew: data echoing, where a step costs less than its images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Settings with which a family is trained. Frozen, typed, checked when made; JSON in every checkpoint."""

    size: int = 256
    """Height and width of the network's input, pixels; images are resized on the device."""
    epochs: int = 20
    batch_size: int = 32
    """Images a step over all workers together."""
    accumulate: int = 1
    """Steps whose gradients are summed before the weights move."""
    lr: float = 1e-3
    weight_decay: float = 1e-4
    """Of AdamW: apart from the gradient, and times the learning rate."""
    warmup: float = 0.05
    """Share of a stage's steps in which the learning rate rises to its peak; then it falls along a cosine to 0."""
    clip: float = 1.0
    """Largest gradient norm; 0 for no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is validated and kept; 0 for none."""
    patience: int = 0
    """Epochs of the last stage without a better `monitor` after which training stops; 0 for never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products in training; auto: bfloat16 on GPUs, float32 on CPUs. A CPU that does not
    compute in bfloat16 (AVX512-BF16 or AMX: twice the pace) takes float32 all the same."""
    sync_batch_norm: bool = True
    """With several GPUs, take the statistics of batch norm from the images of all of them (SyncBatchNorm)."""
    seed: int = 0
    lung_crop: str = ""
    """URI of a checkpoint of family `lungs`: images are cropped to the square around the lungs; empty: not at all."""
    lung_margin: float = MARGIN
    """Added on each side of the smallest square around the lungs, as a share of its side."""
    denoise: Denoise = "none"
    """Noise removal from the images as they were decoded: median, or nlm: non-local means, which take some
    0.3 s of a core for 1024 x 1024."""
    normalize: Normalize = "none"
    """percentile: each image's 1st and 99th percentile become black and white."""
    equalize: Equalize = "none"
    """clahe: contrast equalized within parts of each image, with a limit."""
    folds: int = 0
    """Deal the patients of the train and val splits anew into so many folds, of which one validates; 0: the archive's
    own split."""
    fold: int | None = None
    """The fold that validates, from 0; left out, a train job trains a network for each."""

    family: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]]
    """Which way `monitor` is better."""
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS,)
    """Columns of `cxr.schema` that a batch must hold."""
    score_columns: ClassVar[pa.Schema]
    """Columns that `predict` adds to `schema.SCORES`."""
    mask_label: ClassVar[str] = schema.LUNGS
    """Which of an image's masks a batch holds, if `columns` has masks."""
    places: ClassVar[tuple[str, ...]] = ("lung_crop",)
    """Settings that say where something lies, not what it is: it may be moved between two runs. What a family adds
    to these is what training starts from, and not needed any more once it has."""
    needs: ClassVar[Mapping[str, str]] = {}
    """Searched setting -> the setting that switches off, with 0, what it belongs to."""
    ema_ramp: ClassVar[float] = 0.0
    """Moves of the weights over which `ema` rises to its value: after n it is ema · (1 − exp(−n / ema_ramp)); 0: at
    once."""

    def __post_init__(self) -> None:
        for name in ("size", "epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: wanted 1 or more")
        _ = self.enhancement  # raises
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr={self.lr}: wanted a positive number")
        if not 0 <= self.ema < 1 or not 0 <= self.warmup < 1:
            raise UserError(f"ema={self.ema}, warmup={self.warmup}: wanted from 0 up to, not including, 1")
        if not 0 <= self.lung_margin <= 1:
            raise UserError(f"lung_margin={self.lung_margin}: wanted from 0 to 1")
        if self.folds < 0 or self.folds == 1 or not (self.fold is None or 0 <= self.fold < self.folds):
            raise UserError(
                f"folds={self.folds}, fold={self.fold}: wanted 0 or at least 2 folds, and a fold from 0 up to, not "
                f"including, their number"
            )

    @property
    @abstractmethod
    def monitor(self) -> str:
        """The validation metric by which checkpoints and trials are ranked."""

    @property
    def enhancement(self) -> Enhancement:
        """What is done to images before they are stored or seen; the same in training and in scoring."""
        return Enhancement(self.denoise, self.normalize, self.equalize)

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        """Validation metrics that a search may weigh against each other, and which way each is better."""
        return {}

    @property
    def may_grow(self) -> tuple[str, ...]:
        """Settings that may differ when a finished or killed run is gone on with: how long to train."""
        return ("epochs", "patience")

    def stages(self) -> tuple[Stage, ...]:
        """What training goes through, at least one stage; only networks of the last are ranked and kept as best."""
        return (Stage("", self.epochs, self.lr),)

    @property
    def loss_scale(self) -> float:
        """What the sum of the loss terms is multiplied by before gradients are taken; `clip` is of such gradients."""
        return 1.0

    def optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        """Of all of the task's parameters that require a gradient, for one stage."""
        learning = [parameter for parameter in task.parameters() if parameter.requires_grad]
        return optimizers.adamw(learning, stage.lr, self.weight_decay, fused=fused)

    def schedule(self, optimizer: Optimizer, stage: Stage, moves: int) -> LRScheduler:
        """Stepped whenever the weights have moved, `moves` times an epoch of the stage."""
        return optimizers.warmup_cosine(optimizer, self.warmup, stage.epochs * moves)

    def positive_share(self, epoch: int) -> float | None:
        """Share of the images of epoch number `epoch`, from 0, that are to show `sampled_finding`.

        None: images as they are. In all epochs or in none; every epoch then shows equally many images, see
        `cxr.data.sampling.Sampling`.
        """
        return None

    @property
    def sampled_finding(self) -> str:
        """A finding of the archive, or `schema.ANY_FINDING`: what `positive_share` speaks of."""
        return self.mask_label

    @property
    def total_epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages())

    @property
    def unranked_epochs(self) -> int:
        """Epochs before the last stage."""
        return self.total_epochs - self.stages()[-1].epochs

    @abstractmethod
    def network(self, findings: Sequence[str]) -> nn.Module:
        """A new network, seeded by the caller, on the CPU. Loads no weights that a checkpoint would bring."""

    @abstractmethod
    def task(self, network: nn.Module) -> Task:
        """The training task around `network`, on the CPU; may load frozen loss networks from their URI."""

    @abstractmethod
    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What scores are made of, tensors with the first axis B. Called in inference mode."""

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table) -> pa.Table:
        """Scores, a table of `score_columns`, from what `predict` made of `rows`, which have all columns of a row."""
        columns = [to_arrow(predicted[field.name], field.type) for field in self.score_columns]
        return pa.table(columns, schema=self.score_columns)

    def draw(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Pictures of a batch for `score_archive --save-images`: name -> uint8 (B, H, W) or (B, H, W, 3)."""
        return {}

    @property
    def latents(self) -> PixelFormat:
        """What `encode` gives, as latent archives hold it.

        Raises:
            UserError: this family compresses nothing, or to less than an archive can hold.
        """
        raise UserError(f"family {self.family!r} has no latents: give a checkpoint of one that compresses images")

    def encode(self, network: nn.Module, batch: Batch) -> Tensor:
        """A batch's latents as they are stored, (B, h, h), uint8 or uint16. Called in inference mode."""
        raise NotImplementedError

    def encoder_state(self, network: nn.Module) -> dict[str, Tensor]:
        """All tensors by which `encode` of two networks of this recipe may differ."""
        raise NotImplementedError

    def predict_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`predict`, where the batch's pixels are what `encode` gave of the images."""
        raise NotImplementedError

    def draw_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`draw`, where the batch's pixels are what `encode` gave of the images."""
        raise NotImplementedError

    def search_space(self) -> dict[str, BaseDistribution]:
        """Fields that Tune may draw, with Optuna's distributions: only those that the stages that run make use of."""
        return {}

    @final
    def searched(self, fixed: Collection[str] = ()) -> dict[str, BaseDistribution]:
        """`search_space` without `fixed` settings, and without those of which every draw would train the same.

        The latter have a single value to draw, or belong to something that is switched off (`needs`).
        """
        space = {
            name: drawn for name, drawn in self.search_space().items() if name not in fixed and not drawn.single()
        }
        idle = {name for name, other in self.needs.items() if other not in space and not getattr(self, other)}
        return {name: drawn for name, drawn in space.items() if name not in idle}

    def initial_weights(self) -> dict[str, str]:
        """Settings that name weights which training starts from, but for those that have no effect.

        To each, the torchvision network of which it may name weights; empty: it takes a path or URI alone.
        """
        return {}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        """What workers need of the weights that one of `initial_weights` names.

        Raises:
            ValueError: they do not fit this recipe; the message says in one line how they differ.
        """
        raise NotImplementedError

    def without_weights(self, setting: str) -> Self | None:
        """This recipe where the weights that `auto` stands for cannot be had; None where it needs them."""
        return self.replace(**{setting: ""})

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Settings that name weights by something else than a URI; none after `resolved`."""
        named = {name: getattr(self, name) for name in self.initial_weights()}
        return tuple(name for name, value in named.items() if value and not pretrained.is_uri(value))

    def resolved(self, out: str) -> tuple[Self, list[str]]:
        """This recipe with the weights that it names stored in OUT, and what to tell the user; see `weights.resolve`.

        Called once, before any worker starts: workers read the URIs that they are given.

        Raises:
            UserError: weights that were named cannot be had, or do not fit.
        """
        return pretrained.resolve(self, self.initial_weights(), out)

    def resumed(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        """`resolved`, where training goes on from a checkpoint of the settings `begun`, as `to_dict` wrote them.

        What it only started from, the family's own `places`, stays as it was and need not be had again.
        """
        if self.changes_from(begun, self.may_grow):
            return self.resolved(out)
        started = {name: begun[name] for name in self.places if name in begun and name not in Recipe.places}
        return self.replace(**started), []

    def prepared(self, out: str) -> Self:
        """This recipe with what all its trainings share made ready in OUT: a network that they build on, say.

        Called once, on a device like a worker's; what an earlier call made in OUT is used again. `train.prepare`
        does this on the cluster.
        """
        return self

    @property
    def is_prepared(self) -> bool:
        """Whether `prepared` has nothing to do."""
        return True

    def refusal(self, metrics: Mapping[str, float]) -> str:
        """Why a network with these validation metrics must not be kept, however well it does; empty if it may."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}

    def changes_from(self, old: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
        """In words, each setting that differs from what `to_dict` once wrote, but for `free` ones and `places`.

        A setting of which nothing was written, since there was none then, was as it is by default.
        """
        if old.get("family", self.family) != self.family:
            return [f"family was {old['family']!r}, is {self.family!r}"]
        new, default = (json.loads(json.dumps(one.to_dict())) for one in (self, type(self)()))
        was = default | dict(old)
        return [
            f"{name} was {was[name]!r}, is {value!r}"
            for name, value in new.items()
            if name not in (*free, *self.places) and was[name] != value
        ]

    def replace(self, **changes: Any) -> Self:
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise UserError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        values = dict(values)
        family = values.pop("family", cls.family)
        if family != cls.family:
            raise UserError(f"a recipe of family {family!r} was given to {cls.family!r}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


SomeRecipe = TypeVar("SomeRecipe", bound=Recipe)


def one_of(name: str, value: object, wanted: Sequence[object]) -> None:
    """Raise UserError unless the setting `name` has one of the values that are `wanted`."""
    if value not in wanted:
        raise UserError(f"{name}={value!r}: wanted one of {', '.join(map(str, wanted))}")


def check_size(recipe: Recipe, stored: int) -> None:
    """Raise UserError where images are stored smaller than the network wants them."""
    if stored < recipe.size:
        raise UserError(
            f"pixels stored at {stored} px cannot feed a network of size={recipe.size}: ingest the archive again "
            f"with larger pixels, or lower the recipe's size"
        )


def unit_pixels(batch: Batch, size: int) -> Tensor:
    """A batch's pixels, stored or augmented, as float32 (B, 1, size, size) in [0, 1], resized by area."""
    stored = batch[schema.PIXELS]
    assert stored.shape[-1] >= size, "enlarging would only pretend detail: see check_size"
    x_B1HW = unit(stored.unsqueeze(1))
    return x_B1HW if x_B1HW.shape[-1] == size else F.interpolate(x_B1HW, size=(size, size), mode="area")


def unit(stored: Tensor) -> Tensor:
    """Values of uint8 or uint16 as float32 in [0, 1]; float32 as it is."""
    if stored.is_floating_point():
        return stored
    return stored.float().div_(255.0 if stored.dtype == torch.uint8 else 65535.0)
