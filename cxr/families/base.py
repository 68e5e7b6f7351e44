"""The contract of a model family: a `Recipe` (settings, network, scores) and a `Task` (losses, metrics).

The training loop, the search and scoring know only this file and `capabilities`. It imports no Ray, so a task can be
trained in a bare torch loop.
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

from cxr import schema
from cxr.data.batch import Batch, to_arrow
from cxr.errors import UserError
from cxr.imaging.enhance import Denoise, Enhancement, Equalize, Normalize
from cxr.imaging.lung_bbox import MARGIN
from cxr.models import pretrained
from cxr.models.input_contract import UNIT, InputContract
from cxr.models.pretrained import Fit, Weights
from cxr.precision import outside_autocast
from cxr.schema import PixelFormat

Batches = Callable[[], Iterator[Batch]]
"""Each call makes one pass over this worker's share of the images."""


class Communicator(Protocol):
    """The group of workers that train together. All members must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum(self, values: Tensor) -> Tensor:
        """Sum of one tensor per worker; all have the same shape."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all workers, concatenated along the first axis. The numbers of rows may differ."""
        ...

    def all_rows(self, rows: Tensor) -> Tensor:
        """Rows of all workers in order of rank, the same number from each: `rows` begins at `rank * len(rows)`.

        For training steps: it does not wait for the device, and gradients flow back to the workers that own the rows.
        """
        ...


class SingleProcess:
    """A group of one worker."""

    rank, size = 0, 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def all_rows(self, rows: Tensor) -> Tensor:
        return rows


class Task(nn.Module):
    """A network together with the losses and metrics it is trained with.

    A training step calls `augment`, then `forward` on the result. `forward` returns weighted loss terms; the loop
    minimizes their sum. Only `self.network` is kept for scoring. Other state that training must resume with belongs
    in buffers; sums over a worker's images of the current epoch in buffers that are not persistent.

    The loop averages losses and gradients over workers. Anything that is not a sum over images, such as the distance
    of a batch's mean or the choice of a partner image, needs the rows of all workers (`workers.all_rows`): one
    worker's share of a batch may be a single image.

    `augment` and `forward` should not wait for the device: no `.item()`, no `if` on a tensor, no boolean indexing.
    """

    network: nn.Module
    workers: Communicator = SingleProcess()
    """The workers that train together; set by the training loop."""

    @final
    @torch.no_grad()
    def augment(self, batch: Batch) -> Batch:
        """The batch as one training step sees it: runs `augmented` outside autocast, so coordinates are float32.

        Called once per step, in train mode, on the batch's device.
        """
        with outside_autocast(next(iter(batch.values())).device):
            return self.augmented(batch)

    def augmented(self, batch: Batch) -> Batch:
        """Random augmentation of a batch; families override this method, not `augment`.

        Everything random in a step belongs here. Return a new batch and leave the given one unchanged, because
        several steps may use the same batch. Changed pixels are float32 in [0, 1]. Draw small random parameters from
        PyTorch's CPU generator, so that a GPU draws the same ones, and move them with `non_blocking=True`; noise for
        every pixel may be sampled on the device.
        """
        return batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted scalar loss terms by name, of an augmented batch. Runs under autocast, in train mode.

        Compute coordinates with the functions of `cxr.precision`, or mark the function `in_float32`.
        """
        raise NotImplementedError

    def compiled_modules(self) -> list[nn.Module]:
        """Modules that `--compile` compiles, each called once per step."""
        return [self.network]

    @final
    def epoch_sums(self) -> list[Tensor]:
        """The task's own buffers that are not persistent: sums over this worker's images of the current epoch."""
        return [b for n, b in self.named_buffers(recurse=False) if n in self._non_persistent_buffers_set]

    def enter_stage(self, stage: str) -> None:
        """Called before each stage and when resuming inside one. Freeze everything this stage does not train."""

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Called before the first step of a new run, not when resuming. `batches` gives the training images."""

    def end_epoch(self, workers: Communicator) -> None:
        """Called after each epoch's last step, before validation."""

    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `self.network` on all workers' validation images; the same values on every worker."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the task has learned besides weights, as JSON for readers of a checkpoint: thresholds, for example."""
        return {}

    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """Write pictures that show what the network does, and learned state that is useful as a separate file.

        Args:
            image_ids: ids of the images of the first batch, in its order.
        """


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with its own optimizer and schedule, in which a subset of the parameters may be trained."""

    name: str
    epochs: int
    lr: float
    data_echo_factor: int = 1
    """Steps per batch, each with new augmentation (data echoing, Choi et al. 2019): useful where a step is cheaper
    than loading its images."""


@dataclasses.dataclass(frozen=True)
class ScoringContext:
    """What turns predictions into scores, besides the rows that were scored."""

    findings: tuple[str, ...]
    """The checkpoint's findings, in the order of the network's outputs."""
    stored_size: int
    """Height and width in pixels of the stored images. The rows' resize transforms map to these pixels."""
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Decision thresholds by finding, or by the label of a mask, in place of the network's own; see
    `families.thresholds_file`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Settings that a family is trained with. Frozen, typed, validated when made, and saved in every checkpoint."""

    size: int = 256
    """Height and width of the network's input in pixels. Images are resized on the device."""
    epochs: int = 20
    """Number of training epochs."""
    batch_size: int = 32
    """Number of images per step, over all workers."""
    accumulate: int = 1
    """Number of steps whose gradients are summed before the weights are updated."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_batch_size: int = 0
    """Batch size for which the learning rates were chosen: they are multiplied by batch_size / lr_batch_size (linear
    scaling rule, Goyal et al. 2017). 0: use them as they are."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay, scaled by the learning rate."""
    warmup: float = 0.05
    """Fraction of a training stage's steps in which the learning rate rises to its peak. It then follows a cosine
    down to 0."""
    clip: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down. 0: no clipping."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, which is validated and saved in their place. After n
    steps it is at most (1 + n) / (10 + n). 0: no average."""
    patience: int = 0
    """Early stopping: number of epochs of the last training stage without improvement of the monitored metric after
    which training stops. 0: never stop early."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of convolutions and matrix products in training. auto uses bfloat16 on GPUs and float32 on CPUs.
    bfloat16 halves the time on CPUs with AVX512-BF16 or AMX; all other CPUs use float32 in any case."""
    sync_batch_norm: bool = True
    """With several GPUs, compute batch-norm statistics over the images of all of them (SyncBatchNorm)."""
    seed: int = 0
    """Random seed."""
    lung_crop: str = ""
    """URI of a checkpoint of family lungs. Images are cropped to the square around the lungs. Empty: no crop."""
    lung_margin: float = MARGIN
    """Margin added on each side of the smallest square around the lungs, as a fraction of its side."""
    aligner: str = ""
    """URI of a checkpoint of family align. Images are registered to its common frame, in a single resampling of the
    original pixels. Family attend aligns in its network instead. Empty: no alignment."""
    denoise: Denoise = "none"
    """Noise removal after decoding: median, or nlm (non-local means, about 0.3 s of one core per 1024 x 1024
    image)."""
    normalize: Normalize = "none"
    """Gray-value normalization. percentile maps each image's 1st and 99th percentile to black and white."""
    equalize: Equalize = "none"
    """Contrast equalization. clahe: contrast-limited adaptive histogram equalization."""
    folds: int = 0
    """Divide the patients of the train and val splits into this many folds, and validate on one of them. 0: use the
    archive's own split."""
    fold: int | None = None
    """Index of the fold to validate on, from 0. Unset: a training job trains one network per fold."""

    family: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]]
    """Whether a smaller or a larger `monitor` is better."""
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS,)
    """Columns of `cxr.schema` that a batch must contain."""
    score_columns: ClassVar[pa.Schema]
    """Columns that scoring adds to `schema.SCORES`."""
    mask_label: ClassVar[str] = schema.LUNGS
    """Label of the masks in a batch, if `columns` includes masks."""
    CROP_SETTINGS: ClassVar[tuple[Literal["aligner", "lung_crop"], ...]] = ("aligner", "lung_crop")
    """Settings that name a checkpoint by which images are cropped before the network sees them."""
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = ("lung_crop", "aligner")
    """Settings that say where something is, not what it is: they may change between two runs. Families add the URIs
    of initial weights, which are not needed after the first step."""
    depends_on: ClassVar[Mapping[str, str]] = {}
    """Maps a searched setting to the setting that must not be 0 for it to have an effect."""

    def __post_init__(self) -> None:
        for name in ("size", "epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        _ = self.enhancement  # raises
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr: expected a positive number, got {self.lr}")
        if self.lr_batch_size < 0:
            raise UserError(f"lr_batch_size: expected a batch size, or 0, got {self.lr_batch_size}")
        for name in ("ema", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{name}: expected a number from 0 up to, but not including, 1, got {getattr(self, name)}"
                )
        for name in ("weight_decay", "clip", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.lung_margin <= 1:
            raise UserError(f"lung_margin: expected a fraction from 0 to 1, got {self.lung_margin}")
        if self.lung_crop and self.crop_setting == "aligner":
            raise UserError("expected one of lung_crop and aligner, got both: leave one out")
        if self.folds < 0 or self.folds == 1:
            raise UserError(f"folds: expected 0 or at least 2, got {self.folds}")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise UserError(
                f"fold: expected an index from 0 up to, but not including, folds={self.folds}, got {self.fold}"
            )

    @property
    @abstractmethod
    def monitor(self) -> str:
        """The validation metric that ranks checkpoints and trials."""

    @property
    def crop_setting(self) -> Literal["lung_crop", "aligner", ""]:
        """The setting that names the checkpoint by which images are cropped before the network sees them; empty if
        there is none. See `families.image_crop`."""
        for name in self.CROP_SETTINGS:
            if getattr(self, name):
                return name
        return ""

    @property
    def crop_checkpoint(self) -> str:
        """URI of the checkpoint by which images are cropped; empty if they are not."""
        return getattr(self, self.crop_setting) if self.crop_setting else ""

    def with_crop_checkpoint(self, uri: str) -> Self:
        """The recipe with another URI of the checkpoint by which images are cropped, if they are."""
        return self.replace(**{self.crop_setting: uri}) if self.crop_setting else self

    @property
    def enhancement(self) -> Enhancement:
        """Enhancement applied to images before they are stored; the same in training and scoring."""
        return Enhancement(self.denoise, self.normalize, self.equalize)

    @property
    def input_contract(self) -> InputContract:
        """What the weights expect as input. The network applies it to the gray values in [0, 1] that it is given."""
        return UNIT.replace(size=self.size)

    @property
    def pixel_format(self) -> PixelFormat:
        """Format in which originals are decoded for scoring."""
        return PixelFormat(self.size, self.input_contract.bits)

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        """Validation metrics that a search can trade off against each other, with their directions."""
        return {}

    @property
    def may_change_on_resume(self) -> tuple[str, ...]:
        """Settings that may differ when a finished or interrupted run is resumed: how long to train."""
        return ("epochs", "patience")

    def stages(self) -> tuple[Stage, ...]:
        """The stages of training, at least one. Only networks of the last stage are ranked."""
        return (Stage("", self.epochs, self.lr),)

    @property
    def lr_factor(self) -> float:
        """Factor of all learning rates by the linear scaling rule."""
        return self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0

    @property
    def total_epochs(self) -> int:
        """Number of epochs of all stages."""
        return sum(stage.epochs for stage in self.stages())

    @property
    def unranked_epochs(self) -> int:
        """Number of epochs before the last stage."""
        return self.total_epochs - self.stages()[-1].epochs

    @abstractmethod
    def network(self, findings: Sequence[str]) -> nn.Module:
        """A new network on the CPU, initialized from the current random seed. Does not load pretrained weights."""

    @abstractmethod
    def task(self, network: nn.Module) -> Task:
        """The training task around `network`, on the CPU. May load frozen loss networks from their URI."""

    @abstractmethod
    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Predictions for a batch, as tensors whose first axis is B. Called in inference mode."""

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        """Scores as a table of `score_columns`, from what `predict` returned for `rows` (all columns of good
        rows)."""
        columns = [to_arrow(predicted[field.name], field.type) for field in self.score_columns]
        return pa.table(columns, schema=self.score_columns)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Pictures of a batch for `cxr score --save-images`, by name: uint8 (B, H, W) or (B, H, W, 3) in RGB."""
        return {}

    def with_tta_flip(self, on: bool) -> Self | None:
        """This recipe with predictions averaged over images and their mirror images, or not; None if the family
        has no such setting."""
        has_it = any(field.name == "tta_flip" for field in dataclasses.fields(self))
        return self.replace(tta_flip=on) if has_it else None

    def search_space(self) -> dict[str, BaseDistribution]:
        """Settings worth searching, with Optuna's distributions. Includes only those that the stages to run use."""
        return {}

    def check_network(self) -> None:
        """Raise UserError if a setting names a network that does not exist. May import a library, which takes
        seconds."""
        return

    @final
    def active_search_space(self, fixed: Collection[str] = ()) -> dict[str, BaseDistribution]:
        """`search_space` without `fixed` settings and without settings whose value makes no difference.

        The latter have a single value, or depend on a setting that is 0 (`depends_on`).
        """
        space = {
            name: values for name, values in self.search_space().items() if name not in fixed and not values.single()
        }
        idle = {name for name, other in self.depends_on.items() if other not in space and not getattr(self, other)}
        return {name: values for name, values in space.items() if name not in idle}

    def initial_weights(self) -> dict[str, str]:
        """Settings that name pretrained weights and have an effect, each with its network's name in torchvision.

        An empty name means that torchvision has no weights for it: the setting must be a path or URI.
        """
        return {}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        """How the weights named by one of the `initial_weights` fit; `state` is the part that workers need.

        Raises:
            ValueError: the weights do not fit this recipe; the message says in one line how they differ.
        """
        raise NotImplementedError

    def without_weights(self, setting: str) -> Self | None:
        """This recipe without the weights that `auto` could not fetch. None if it cannot train without them."""
        return self.replace(**{setting: ""})

    @property
    def unresolved_weights(self) -> tuple[str, ...]:
        """Settings that name weights other than by a URI; empty after `resolve_weights`."""
        named = {name: getattr(self, name) for name in self.initial_weights()}
        return tuple(name for name, value in named.items() if value and not pretrained.is_uri(value))

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        """This recipe with its pretrained weights copied to OUT, and notes for the user; see `pretrained.resolve`.

        Called once, before any worker starts. Workers only read URIs.

        Raises:
            UserError: named weights are not available or do not fit.
        """
        return pretrained.resolve(self, self.initial_weights(), out)

    def resume_from(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        """`resolve_weights` for a run that resumes from a checkpoint with the settings `begun` (from `to_dict`).

        Initial weights (`LOCATION_SETTINGS` except `CROP_SETTINGS`) stay as recorded, and need no longer be
        available.
        """
        if self.changes_from(begun, self.may_change_on_resume):
            return self.resolve_weights(out)
        initial = set(self.LOCATION_SETTINGS) - set(self.CROP_SETTINGS)
        return self.replace(**{name: begun[name] for name in initial if name in begun}), []

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}

    def changes_from(self, old: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
        """A description of each setting that differs from `old` (from `to_dict`), except `free` and locations.

        Settings that `old` does not have, because they were added later, count as having had their default value.
        """
        if old.get("family", self.family) != self.family:
            return [f"family was {old['family']!r}, is {self.family!r}"]
        new, default = (json.loads(json.dumps(recipe.to_dict())) for recipe in (self, type(self)()))
        was = default | dict(old)
        return [
            f"{name} was {was[name]!r}, is {value!r}"
            for name, value in new.items()
            if name not in (*free, *self.LOCATION_SETTINGS) and was[name] != value
        ]

    def replace(self, **changes: Any) -> Self:
        """A copy with other settings.

        Raises:
            UserError: the family has no such setting, or a value is invalid.
        """
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise UserError(f"family {self.family!r} has no setting {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The recipe that `to_dict` described."""
        values = dict(values)
        family = values.pop("family", cls.family)
        if family != cls.family:
            raise UserError(f"expected a recipe of family {cls.family!r}, got one of {family!r}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


SomeRecipe = TypeVar("SomeRecipe", bound=Recipe)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise UserError unless the setting `name` has one of the `allowed` values."""
    if value not in allowed:
        raise UserError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value}")


def unit_pixels(batch: Batch, size: int) -> Tensor:
    """A batch's pixels, stored or augmented, as float32 (B, 1, size, size) in [0, 1], downsampled by area."""
    stored = batch[schema.PIXELS]
    assert stored.shape[-1] >= size, "upsampling would add no detail: see compatibility.check_size"
    x_B1HW = unit(stored.unsqueeze(1))
    return x_B1HW if x_B1HW.shape[-1] == size else F.interpolate(x_B1HW, size=(size, size), mode="area")


def unit(stored: Tensor) -> Tensor:
    """Values of uint8 or uint16 as float32 in [0, 1]; float32 is returned unchanged."""
    if stored.is_floating_point():
        return stored
    return stored.float().div_(255.0 if stored.dtype == torch.uint8 else 65535.0)
