"""Family `detect`: YOLOv5 finds boxes around findings, trained as Ultralytics trains it, by the house's own loop.

Network, non-maximum suppression and validation metrics are Ultralytics' code (`models.yolo`, `metrics.yolo`). Its
trainer is not used: it owns the process group, the loader and the checkpoints, and calls home. What else it does is
done here by its formulas, which the tests hold against its own code: the loss, for which the host never waits
(`models.detection_loss`), parameter groups and SGD with Nesterov's momentum, the linear schedule with its warm-up of
rates and momentum (`optimizers`), the moving average whose decay rises (`ema_ramp`), gradients of the sum over a
batch, clipped at 10 (`loss_scale`), mosaic, affine, mixup, brightness and flip (`imaging.mosaic`), the last epochs
without mosaic. So fit, resume, search, folds, lung crops and scoring are every family's, and workers share one batch
exactly: the loss is divided by the targets of all of them.

Two things differ from a run of Ultralytics. `accumulate` holds from the first step, where its warm-up raises it. And
weights that are loaded leave the last layers of the classes as they are if their number differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
import tyro
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cxr import schema, storage
from cxr.augment.mosaic import MosaicVariation
from cxr.boxes import ScoredBoxes, wbf
from cxr.boxes.from_heatmaps import MapBoxes
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import box_scores
from cxr.families.base import Recipe, ScoringContext, Stage, Task, one_of, unit_pixels
from cxr.families.detect_task import DetectTask, Lesson, confident, outlined
from cxr.families.optimizers import LinearDecay, grouped_adamw, grouped_sgd
from cxr.models import pretrained
from cxr.models.pretrained import Weights
from cxr.models.yolo import SIZES, STRIDE, Yolo, YoloEnsemble, YoloSize, found

LEAST_SCORE = 0.001  # below it no box is kept
FOUND = "found"  # what `predict` gives
MOST_FOUND = 100  # boxes of an image that are kept
PARTNERS = 64  # images, or those of a step if they are more, of which mosaic and mixup take those that they add
NOMINAL = 64  # images of a step for which `weight_decay` is given


@dataclass(frozen=True, kw_only=True)
class DetectRecipe(Recipe):
    """Finds boxes around findings. Negative findings teach background in images without boxes, too."""

    family: ClassVar[str] = "detect"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.BOXES, schema.LABELS)
    score_columns: ClassVar[pa.Schema] = schema.BOX_SCORES
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "weights")
    ema_ramp: ClassVar[float] = 2000.0

    size: int = 640
    epochs: int = 100
    batch_size: int = 16
    lr: float = 0.01
    algorithm: Literal["sgd", "adamw"] = "sgd"
    """Of optimization: SGD with Nesterov's momentum for long trainings; AdamW, with an lr near 0.001 and biases that
    warm up as all others do, learns sooner where there are only some thousand steps."""
    weight_decay: float = 5e-4
    """Of the weights of convolutions, added to the gradient; for steps of 64 images, in proportion for others."""
    warmup: float = 0.03
    """Share of all steps in which the learning rate rises to its peak; then it falls, evenly from epoch to epoch."""
    clip: float = 10.0
    """Largest norm of the gradient of a step's summed loss."""
    ema: float = 0.9999
    architecture: YoloSize = "yolov5n"
    weights: str = ""
    """Weights to start from: the path or URI of a state dict or checkpoint. Empty: random weights."""

    last_lr: float = 0.01
    """Learning rate at the end, as a share of `lr`."""
    momentum: float = 0.937
    """Of SGD; AdamW's first beta."""
    warmup_momentum: float = 0.8
    """SGD's momentum in the first step."""
    warmup_bias_lr: float = 0.1
    """SGD's learning rate of biases in the first step."""

    incomplete_boxes: Literal["mask", "exclude"] = "mask"
    """How to use images that show a finding without a box for it, or of which a finding is unknown. mask: they teach
    everything but that finding, which counts neither as background nor, in validation, as a false positive. exclude:
    they are not used. Masking is the default because most boxed images of ChestX-ray14 are of this kind."""

    box: float = 7.5
    """Weight of the boxes' overlap (CIoU)."""
    cls: float = 0.5
    """Weight of the findings' cross-entropy."""
    dfl: float = 1.5
    """Weight of the distribution focal loss of boxes' edges."""

    mosaic: float = 1.0
    """Augmentation: share of images made of four."""
    mixup: float = 0.0
    """Augmentation: share of images mixed with another."""
    close_mosaic: int = 10
    """Last epochs without mosaic and mixup."""
    rotation_deg: float = 0.0
    """Augmentation: largest rotation."""
    translate: float = 0.1
    """Augmentation: largest shift, as a share of the width."""
    scale: float = 0.5
    """Augmentation: factors lie within 1 ± scale."""
    shear_deg: float = 0.0
    """Augmentation: largest shear along either axis."""
    flip: float = 0.5
    """Augmentation: share of images that are mirrored."""
    value: float = 0.4
    """Augmentation: factors of brightness lie within 1 ± value."""
    nms_iou: float = 0.7
    """Overlap from which, of two boxes of a finding, the one with the lower score is left out."""
    members: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Recipes, as JSON, of networks whose boxes are fused (WBF): an ensemble, which is made of trained networks and
    not trained itself; `train_detect --members` writes them. Empty: one network."""
    fusion_iou: float = 0.55
    """Of an ensemble: overlap from which boxes of a finding become one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("architecture", self.architecture, SIZES)
        one_of("algorithm", self.algorithm, ("sgd", "adamw"))
        one_of("incomplete_boxes", self.incomplete_boxes, ("mask", "exclude"))
        if self.size % STRIDE:
            raise UserError(f"size={self.size}: wanted a multiple of {STRIDE}")
        if min(self.box, self.cls, self.dfl, self.close_mosaic, self.warmup_bias_lr) < 0:
            raise UserError(
                f"box={self.box}, cls={self.cls}, dfl={self.dfl}, close_mosaic={self.close_mosaic}, "
                f"warmup_bias_lr={self.warmup_bias_lr}: wanted none negative"
            )
        shares = (self.momentum, self.warmup_momentum, self.nms_iou, self.last_lr, self.fusion_iou)
        if not all(0 < share <= 1 for share in shares):
            raise UserError(
                f"momentum={self.momentum}, warmup_momentum={self.warmup_momentum}, nms_iou={self.nms_iou}, "
                f"last_lr={self.last_lr}, fusion_iou={self.fusion_iou}: wanted above 0, up to 1"
            )
        try:
            _ = self._variation()
        except ValueError as error:
            raise UserError(str(error)) from error

    def _variation(self) -> MosaicVariation:
        return MosaicVariation(**{field.name: getattr(self, field.name) for field in fields(MosaicVariation)})

    @property
    def monitor(self) -> str:
        return "map50_95"

    @property
    def loss_scale(self) -> float:
        """Ultralytics adds up the gradients of all images of a step."""
        return float(self.batch_size * self.accumulate)

    def optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        decay = self.weight_decay * self.loss_scale / NOMINAL
        if self.algorithm == "adamw":
            return grouped_adamw(task.network, stage.lr, decay, self.momentum, fused=fused)
        return grouped_sgd(task.network, stage.lr, decay, self.momentum)

    def schedule(self, optimizer: Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        return LinearDecay(
            epochs=stage.epochs,
            moves_an_epoch=updates_per_epoch,
            warmup=round(self.warmup * stage.epochs * updates_per_epoch),
            last=self.last_lr,
            bias_lr=self.warmup_bias_lr if self.algorithm == "sgd" else 0.0,
            first_momentum=self.warmup_momentum,
        ).schedule(optimizer)

    def network(self, findings: Sequence[str]) -> Yolo | YoloEnsemble:
        if self.members:
            return YoloEnsemble([member.yolo(findings) for member in self._members()])
        return self.yolo(findings)

    def _members(self) -> list[DetectRecipe]:
        return [DetectRecipe.from_dict(json.loads(member)) for member in self.members]

    def yolo(self, findings: Sequence[str]) -> Yolo:
        """A single network of this recipe."""
        if not findings:
            raise UserError("the archive knows no findings, and so nothing to draw boxes around: give another one")
        try:
            return Yolo(self.architecture, findings)
        except ImportError as error:
            raise UserError(f"{error}: family detect needs Ultralytics. Run pip install '.[detect]'") from error

    def task(self, network: nn.Module) -> DetectTask:
        lesson = Lesson(
            size=self.size,
            variation=self._variation(),
            partners=max(PARTNERS, self.batch_size),
            open_epochs=self.epochs - self.close_mosaic,
            gains={"box": self.box, "cls": self.cls, "dfl": self.dfl},
            found=self.found,
            exclude=self.incomplete_boxes == "exclude",
        )
        return DetectTask(network, lesson, self._start)

    def found(self, network: nn.Module, batch: Batch, most: int) -> Tensor:
        """What the network or the ensemble finds in a batch; see `models.yolo.found`."""
        if isinstance(network, YoloEnsemble):
            both = zip(self._members(), network.members, strict=True)
            return fused([member.found(one, batch, most) for member, one in both], self.fusion_iou, most)
        assert isinstance(network, Yolo)
        x = unit_pixels(batch, self.size)
        return found(network, x, score=LEAST_SCORE, iou=self.nms_iou, most=most)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, Yolo | YoloEnsemble)
        return {FOUND: self.found(network, batch, MOST_FOUND)}

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        found = [_listed(boxes) for boxes in predicted[FOUND].cpu().numpy()]
        return pa.table([box_scores.to_box_column(found, rows, context)], schema=self.score_columns)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """boxes: the image with the outlines of what was found with some confidence, (B, size, size, 3)."""
        boxes = confident(self.found(network, batch, MOST_FOUND))
        return {"boxes": outlined(unit_pixels(batch, self.size), boxes)}

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate, loss weights and how far images are scaled."""
        return {
            "lr": FloatDistribution(1e-3, 3e-2, log=True),
            "box": FloatDistribution(2, 15, log=True),
            "cls": FloatDistribution(0.2, 2, log=True),
            "scale": FloatDistribution(0.0, 0.9),
        }

    def initial_weights(self) -> dict[str, str]:
        return {"weights": ""}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        self.yolo(given.findings or schema.FINDINGS).load(given.state)
        return given.state

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        if self.members:
            raise UserError("members: an ensemble is made of trained networks, not trained. Leave members out")
        try:
            return super().resolve_weights(out)
        except (pretrained.NotWeightsError, storage.NotFoundError) as error:
            raise UserError(f"{error}. {CONVERSION}") from error

    def _start(self, network: nn.Module) -> None:
        assert isinstance(network, Yolo)
        if self.weights:
            network.load(pretrained.from_uri(self.weights))


CONVERSION = (
    "Ultralytics' own files (yolov5nu.pt) hold code, which is not run here. Where you trust one, make a state dict "
    'of it: python -c "import torch, ultralytics; '
    "torch.save(ultralytics.YOLO('yolov5nu.pt').model.float().state_dict(), 'yolov5nu_weights.pt')\""
)


def fused(members: Sequence[Tensor], iou: float, most: int) -> Tensor:
    """The boxes of several networks made one set by weighted boxes fusion; (B, most, 6) as each of them has.

    A box that only some networks find has their mean score times their share (`avg` of `boxes.wbf`).
    """
    images = [
        [_as_found(boxes) for boxes in image] for image in zip(*(m.cpu().numpy() for m in members), strict=True)
    ]
    together = np.full((len(images), most, 6), np.nan, np.float32)
    for row, (boxes, scores, labels) in zip(together, wbf(images, iou_thr=iou), strict=True):
        row[: len(boxes)] = np.column_stack([boxes, scores, labels])[:most]
    return torch.from_numpy(together).to(members[0].device)


def _as_found(boxes_N6: np.ndarray) -> ScoredBoxes:
    kept = boxes_N6[~np.isnan(boxes_N6[:, 4])].astype(np.float64)
    return ScoredBoxes(kept[:, :4].clip(0, 1), kept[:, 4], kept[:, 5].astype(int))


def _listed(boxes_N6: np.ndarray) -> MapBoxes:
    kept: Any = boxes_N6[~np.isnan(boxes_N6[:, 4])]
    return MapBoxes(kept[:, 5].astype(int), kept[:, :4].astype(np.float64), kept[:, 4].astype(np.float64))
