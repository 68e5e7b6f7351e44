"""Family `detect`: YOLOv5 predicts boxes around findings, trained by Ultralytics' method in our own loop.

Network and non-maximum suppression are Ultralytics' code (`models.yolo`). Its trainer is not used, because it owns
the process group, the loader and the checkpoints, and connects to the internet. Instead its formulas are implemented
here, and tests compare them with Ultralytics' own code: the loss, for which the host never waits
(`models.detection_loss`); parameter groups, SGD with Nesterov momentum, and the linear schedule with a warmup of
rates and momentum (`optimizers`); the moving average whose decay rises (`ema_ramp`); gradients of the sum over a
batch, clipped at 10 (`loss_scale`); mosaic, affine, mixup, brightness and flip (`augment.mosaic`); the last epochs
without mosaic. So resuming, searches, folds, crops and scoring work as in all families, and several workers
train exactly as one
would: the loss is divided by the number of targets of all workers.

Two things differ from Ultralytics. `accumulate` holds from the first step, while Ultralytics raises it during the
warmup. And class layers of pretrained weights are skipped if the number of findings differs.

The location of a finding is known if the image has a box of it or a negative label. If it is unknown, because the
label is positive without a box or the label is unknown, it must not be trained as background: the image gets a region
in which this finding is unknown, and augmentation moves such regions as it moves boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cxr import schema, storage
from cxr.augment.mosaic import MosaicVariation, augment_with_boxes
from cxr.boxes import ScoredBoxes, wbf
from cxr.boxes.from_heatmaps import MapBoxes
from cxr.data.batch import MOST_BOXES, Batch
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Recipe, ScoringContext, Stage, Task, one_of, unit_pixels
from cxr.families.box_scores import to_box_column
from cxr.families.optimizers import LinearDecay, grouped_adamw, grouped_sgd
from cxr.families.outlines import TRUTH_COLOR, outlined_boxes
from cxr.families.partner_window import PARTNERS, USABLE, PartnerWindow
from cxr.metrics.detection import BoxMeter
from cxr.models import pretrained
from cxr.models.detection_loss import DetectionLoss
from cxr.models.pretrained import Fit, Weights
from cxr.models.weight_files import NotWeightsError
from cxr.models.yolo import SIZES, STRIDE, Yolo, YoloSize, predict_boxes
from cxr.reporting import figures

PREDICTIONS = "predictions"  # from `predict`: (B, MAX_BOXES, 6)
MIN_SCORE = 0.001  # boxes with lower scores are dropped
MAX_BOXES = 100  # boxes per image, in validation as in scoring
NOMINAL_BATCH_SIZE = 64  # images per update for which `weight_decay` is given
UNKNOWN = "unknown"  # of an augmented batch: (B, K, 5) regions in which a finding is unknown, in the form of boxes
SHOWN_IMAGES, SHOWN_SCORE = 6, 0.1

CONVERSION = (
    "Ultralytics' own files (yolov5nu.pt) contain code, which is not run here. If you trust a file, import it: "
    "cxr import-weights yolov5nu.pt --from ultralytics --trust --out yolov5nu"
)


@dataclass(frozen=True, kw_only=True)
class DetectRecipe(Recipe):
    """Detects findings as bounding boxes. Images without boxes are background for findings labeled negative."""

    family: ClassVar[str] = "detect"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.BOXES, schema.LABELS)
    score_columns: ClassVar[pa.Schema] = schema.BOX_SCORES
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "pretrained")
    ema_ramp: ClassVar[float] = 2000.0
    decision_buffers: ClassVar[tuple[str, ...]] = ()

    size: int = 640
    epochs: int = 100
    batch_size: int = 16
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. sgd (with Nesterov momentum) suits long training runs. adamw, with an lr of about 0.001 and no
    separate warmup of biases, learns faster in a few thousand steps."""
    weight_decay: float = 5e-4
    """Weight decay of convolution weights, added to the gradient. The value is for updates of 64 images and is
    scaled in proportion for other batch sizes."""
    warmup: float = 0.03
    """Fraction of all steps in which the learning rate rises to its peak. It then falls linearly, once per epoch."""
    clip: float = 10.0
    """Maximum norm of the gradient of a step's summed loss. 0 turns clipping off."""
    ema: float = 0.9999
    architecture: YoloSize = "yolov5n"
    """Network, from the smallest (yolov5n) to the largest (yolov5x)."""
    pretrained: str = ""
    """Initial weights: path or URI of a state dict or checkpoint. Empty: random weights."""

    final_lr_fraction: float = 0.01
    """Learning rate at the end, as a fraction of `lr`."""
    momentum: float = 0.937
    """Momentum of SGD, or the first beta of AdamW."""
    warmup_momentum: float = 0.8
    """Momentum of SGD in the first step."""
    warmup_bias_lr: float = 0.1
    """Learning rate of biases in the first step of SGD."""

    incomplete_boxes: Literal["mask", "exclude"] = "mask"
    """How to use an image with a finding that is positive but has no box, or whose label is unknown. mask: ignore
    this finding in the image (the image is not background for it, and its boxes are not false positives), and use the
    image for all other findings. exclude: do not use such images, which are the majority of the images with boxes in
    ChestX-ray14."""

    box_weight: float = 7.5
    """Weight of the boxes' overlap loss (CIoU)."""
    class_weight: float = 0.5
    """Weight of the findings' cross-entropy."""
    dfl_weight: float = 1.5
    """Weight of the distribution focal loss of box edges."""

    mosaic: float = 1.0
    """Augmentation: probability that a training image is a mosaic of four images."""
    mixup: float = 0.0
    """Augmentation: probability that a training image is blended with another image."""
    close_mosaic: int = 10
    """Number of epochs without mosaic and mixup at the end."""
    rotation_deg: float = 0.0
    """Augmentation: maximum rotation in degrees."""
    translate: float = 0.1
    """Augmentation: maximum translation as a fraction of the width."""
    scale_jitter: float = 0.5
    """Augmentation: zoom factors are within 1 ± this value."""
    shear_deg: float = 0.0
    """Augmentation: maximum shear along either axis in degrees."""
    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    hsv_v: float = 0.4
    """Augmentation: brightness factors are within 1 ± this value. The name is Ultralytics'."""
    nms_iou: float = 0.7
    """IoU threshold of non-maximum suppression: of two boxes of a finding that overlap more, the one with the lower
    score is dropped."""
    fusion_iou: float = 0.55
    """IoU above which the boxes of a finding from different members of an ensemble are fused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("architecture", self.architecture, SIZES)
        one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        one_of("incomplete_boxes", self.incomplete_boxes, ("mask", "exclude"))
        if self.size % STRIDE:
            raise UserError(f"size: expected a multiple of {STRIDE}, got {self.size}")
        for name in ("box_weight", "class_weight", "dfl_weight", "close_mosaic", "warmup_bias_lr"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("momentum", "warmup_momentum", "nms_iou", "final_lr_fraction", "fusion_iou"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a number above 0 and at most 1, got {getattr(self, name)}")
        try:
            _ = self.variation
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def variation(self) -> MosaicVariation:
        return MosaicVariation(
            mosaic=self.mosaic,
            mixup=self.mixup,
            rotation_deg=self.rotation_deg,
            translate=self.translate,
            scale_jitter=self.scale_jitter,
            shear_deg=self.shear_deg,
            flip=self.flip,
            hsv_v=self.hsv_v,
        )

    @property
    def monitor(self) -> str:
        return "map_50_95"

    @property
    def loss_scale(self) -> float:
        """Ultralytics sums the gradients of all images of an update."""
        return float(self.batch_size * self.accumulate)

    def make_optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        decay = self.weight_decay * self.loss_scale / NOMINAL_BATCH_SIZE
        if self.optimizer == "adamw":
            return grouped_adamw(task.network, stage.lr, decay, self.momentum, fused=fused)
        return grouped_sgd(task.network, stage.lr, decay, self.momentum)

    def make_schedule(self, optimizer: Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        return LinearDecay(
            epochs=stage.epochs,
            updates_per_epoch=updates_per_epoch,
            warmup=round(self.warmup * stage.epochs * updates_per_epoch),
            final_fraction=self.final_lr_fraction,
            bias_lr=self.warmup_bias_lr if self.optimizer == "sgd" else 0.0,
            first_momentum=self.warmup_momentum,
        ).schedule(optimizer)

    def network(self, findings: Sequence[str]) -> Yolo:
        try:
            return Yolo(self.architecture, findings)
        except ImportError as error:
            raise UserError(
                f"expected Ultralytics for family detect, got an error ({error}): run pip install 'cxr[detect]'"
            ) from error

    def task(self, network: nn.Module) -> DetectTask:
        return DetectTask(self, network)

    def boxes(self, network: nn.Module, batch: Batch) -> Tensor:
        """Boxes predicted by the network, (B, MAX_BOXES, 6); see `models.yolo.predict_boxes`."""
        assert isinstance(network, Yolo)
        x = unit_pixels(batch, self.size)
        return predict_boxes(network, x, min_score=MIN_SCORE, nms_iou=self.nms_iou, max_boxes=MAX_BOXES)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.raw_predictions(network, batch)

    # ---- Ensembles: `capabilities.Combinable`

    def shared_settings(self) -> tuple[str, ...]:
        return ()

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {PREDICTIONS: self.boxes(network, batch)}

    def combine(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if torch.compiler.is_exporting():
            raise UserError(
                "boxes of several networks are fused outside the network, which cannot be exported: export the "
                "checkpoint of each network"
            )
        return {PREDICTIONS: fused([raw[PREDICTIONS] for raw in members], self.fusion_iou)}

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        return dict(raw)

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """boxes: the image with the outlines of predicted boxes above a minimum score, (B, size, size, 3)."""
        return {"boxes": outlined_boxes(unit_pixels(batch, self.size), shown_boxes(raw[PREDICTIONS]))}

    def raw_evaluation(self, network: nn.Module) -> DetectTask:
        return DetectTask(self, network)

    # ---- Scoring

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        boxes = []
        for boxes_N6 in predicted[PREDICTIONS].cpu().numpy():
            present: Any = boxes_N6[~np.isnan(boxes_N6[:, 4])].astype(np.float64)
            boxes.append(MapBoxes(present[:, 5].astype(int), present[:, :4], present[:, 4]))
        return pa.table([to_box_column(boxes, rows, context)], schema=self.score_columns)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `draw`."""
        return self.draw(self.raw_predictions(network, batch), network, batch)

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate, loss weights and zoom."""
        return {
            "lr": FloatDistribution(1e-3, 3e-2, log=True),
            "box_weight": FloatDistribution(2, 15, log=True),
            "class_weight": FloatDistribution(0.2, 2, log=True),
            "scale_jitter": FloatDistribution(0.0, 0.9),
        }

    def initial_weights(self) -> dict[str, str]:
        return {"pretrained": ""}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        return replace(self.network(weights.findings or schema.FINDINGS).load(weights.state), state=weights.state)

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        try:
            return super().resolve_weights(out)
        except (NotWeightsError, storage.NotFoundError) as error:
            raise UserError(f"{error}. {CONVERSION}") from error


class DetectTask(Task):
    """A detector in training."""

    epoch: Tensor  # number of epochs trained

    def __init__(self, recipe: DetectRecipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.variation = recipe.variation  # of the current epoch
        self.window = PartnerWindow(max(PARTNERS, recipe.batch_size), self._partner_columns)

    def train(self, mode: bool = True) -> DetectTask:
        """Also chooses the epoch's augmentation: the loop calls this once per epoch, when the host may wait."""
        super().train(mode)
        if mode:
            closed = int(self.epoch) >= self.recipe.epochs - self.recipe.close_mosaic
            variation = self.recipe.variation
            self.variation = replace(variation, mosaic=0.0, mixup=0.0) if closed else variation
        return self

    def begin(self, batches: Batches, workers: Communicator) -> None:
        if self.recipe.pretrained:
            assert isinstance(self.network, Yolo)
            self.network.load(pretrained.from_uri(self.recipe.pretrained))
        boxed = any(not bool(batch[schema.BOXES].isnan().all()) for batch in batches())
        if not workers.sum(torch.tensor(float(boxed), device=self.epoch.device)).item():
            raise UserError("expected boxes, got a train split without any: use an archive whose source has boxes")

    def end_epoch(self, workers: Communicator) -> None:
        self.epoch += 1

    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's boxes (B, M, 5), and (B, F) bool: whether the locations of each finding are known."""
        boxes, known = batch[schema.BOXES], known_locations(batch)
        if self.recipe.incomplete_boxes == "exclude":
            complete = known.all(1)
            boxes, known = torch.where(complete[:, None, None], boxes, torch.nan), known & complete[:, None]
        return boxes, known

    def look_ahead(self, batches: Iterator[Batch], skipped: int = 0) -> Iterator[Batch]:
        return self.window.look_ahead(batches, skipped) if self.variation.combines else batches

    def batches_before(self, rows: int) -> int:
        return self.window.batches_before(rows) if self.recipe.variation.combines else 0

    def _partner_columns(self, batch: Batch) -> dict[str, Tensor]:
        """What an image contributes to a mosaic or mixup: stored pixels, boxes, and regions of unknown findings."""
        boxes, known = self.truth(batch)
        boxes_and_regions = torch.cat([boxes, as_regions(unknown_regions(known))], 1)
        return {schema.PIXELS: batch[schema.PIXELS], schema.BOXES: boxes_and_regions, USABLE: known.any(1)}

    def augmented(self, batch: Batch) -> Batch:
        """Images and boxes augmented together. Only images about which something is known are added to others.

        pixels: (B, size, size). boxes: (B, N, 5), at most `MOST_BOXES` per image, or as many as images of the archive
        have; further findings of a mosaic are unknown in it. unknown: see `UNKNOWN`.
        """
        if self.variation.combines:
            self.window.show(batch)
        true_boxes, findings = self._partner_columns(batch)[schema.BOXES], batch[schema.LABELS].shape[1]
        x, moved = augment_with_boxes(
            unit_pixels(batch, self.recipe.size), true_boxes, self.variation, self._draw_partners
        )
        limit = max(MOST_BOXES, batch[schema.BOXES].shape[1])
        boxes = first_boxes(torch.where(moved[..., :1] >= 0, moved, torch.nan))
        regions = first_boxes(torch.where(moved[..., :1] < 0, moved, torch.nan))
        regions = regions[:, : moved.shape[1] // true_boxes.shape[1] * findings]  # of the images that are combined
        beyond_limit = unknown_regions(~has_box(boxes[:, limit:], findings))
        unknown = torch.cat([as_regions(regions), beyond_limit], 1)
        return batch | {schema.PIXELS: x[:, 0], schema.BOXES: boxes[:, :limit], UNKNOWN: unknown}

    def _draw_partners(self, count: int) -> tuple[Tensor, Tensor]:
        rows = self.window.draw(count)
        return unit_pixels(rows, self.recipe.size), rows[schema.BOXES]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of what is known about the images. Images about which nothing is known have no weight.

        They go through the network all the same, so that every step has the same number of images on every worker,
        and the host does not wait to learn how many count.
        """
        boxes, unknown = batch[schema.BOXES], batch.get(UNKNOWN)
        if unknown is None:  # without augmentation
            boxes, known = self.truth(batch)
            unknown = unknown_regions(known)
        assert isinstance(self.network, Yolo)
        loss = DetectionLoss(
            self.network.strides,
            box_weight=self.recipe.box_weight,
            class_weight=self.recipe.class_weight,
            dfl_weight=self.recipe.dfl_weight,
            total=self.workers.sum,
            workers=self.workers.size,
        )
        return loss(self.network(unit_pixels(batch, self.recipe.size)), boxes, unknown)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `BoxMeter`, the report's own, over the findings of each image whose locations are known.

        The only difference from a report is that boxes are not clipped to the original image, but to nothing: an
        image that was padded to a square may have boxes that extend into the padding.
        """
        return self.evaluate_raw(
            ((batch, self.recipe.raw_predictions(self.network, batch)) for batch in batches()), workers
        )

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        meter = BoxMeter(self.epoch.device)
        for batch, raw in predictions:
            boxes, known = self.truth(batch)
            meter.add(of_known_findings(raw[PREDICTIONS], known), boxes)
        findings: Sequence[str] = self.network.findings  # pyright: ignore[reportAssignmentType]
        metrics = meter.results(workers, len(findings))
        return {name: value for name, value in metrics.items() if value == value or name == self.recipe.monitor}

    def describe(self) -> dict[str, Any]:
        return {"epochs": int(self.epoch)}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """boxes.png: images, ground-truth boxes and predicted boxes; images with the most boxes come first."""
        batch = next(iter(batches()))
        counts = (~batch[schema.BOXES][..., 0].isnan()).sum(1)
        order = torch.argsort(counts, descending=True, stable=True)[:SHOWN_IMAGES]
        x, true = unit_pixels(batch, self.recipe.size)[order], batch[schema.BOXES][order]
        boxes = self.recipe.boxes(self.network, batch)[order]
        predicted = f"predicted boxes with a score of {SHOWN_SCORE:g} or more"
        rows = {
            "image": x[:, 0].cpu().numpy(),
            "ground-truth boxes": outlined_boxes(x, true[..., 1:], TRUTH_COLOR).numpy() / 255,
            predicted: outlined_boxes(x, shown_boxes(boxes)).numpy() / 255,
        }
        figure = figures.picture_rows(rows, [image_ids[int(i)] for i in order])
        figures.save_figure(figure, str(folder), "boxes.png")


def fused(members: Sequence[Tensor], iou: float) -> Tensor:
    """Boxes of several networks combined by weighted boxes fusion; (B, N, 6) as each of them.

    A box that only some networks predict has their mean score times their fraction (`avg` of `boxes.wbf`).
    """
    arrays = [member.cpu().numpy() for member in members]
    images = []
    for image in zip(*arrays, strict=True):
        predictions = []
        for boxes_N6 in image:
            present = boxes_N6[~np.isnan(boxes_N6[:, 4])].astype(np.float64)
            predictions.append(ScoredBoxes(present[:, :4].clip(0, 1), present[:, 4], present[:, 5].astype(int)))
        images.append(predictions)
    fused_BN6 = np.full(arrays[0].shape, np.nan, np.float32)
    for row, (boxes, scores, labels) in zip(fused_BN6, wbf(images, iou_thr=iou), strict=True):
        row[: len(boxes)] = np.column_stack([boxes, scores, labels])[: len(row)]
    return torch.from_numpy(fused_BN6).to(members[0].device)


def known_locations(batch: Batch) -> Tensor:
    """(B, F) bool: whether it is known where an image shows a finding, or that it does not.

    As `metrics.localization.known_places` for reports: findings that have a box or a negative label.
    """
    labels = batch[schema.LABELS]
    return has_box(batch[schema.BOXES], labels.shape[1]) | (labels == schema.NEGATIVE)


def has_box(boxes_BN5: Tensor, findings: int) -> Tensor:
    """(B, F) bool: whether an image has a box of a finding."""
    return (boxes_BN5[..., :1] == torch.arange(findings, device=boxes_BN5.device)).any(1)


def unknown_regions(known_BF: Tensor) -> Tensor:
    """(B, F, 5) a box around the whole image for each finding that is not known; NaN for the others."""
    low, high = torch.zeros_like(known_BF, dtype=torch.float32), torch.ones_like(known_BF, dtype=torch.float32)
    index = torch.arange(known_BF.shape[1], dtype=low.dtype, device=known_BF.device).expand_as(low)
    return torch.where(known_BF[..., None], torch.nan, torch.stack([index, low, low, high, high], -1))


def as_regions(boxes_BN5: Tensor) -> Tensor:
    """Boxes as the regions of `augment.mosaic.augment_with_boxes`, which have negative indices; and regions back as
    boxes."""
    return torch.cat([-1 - boxes_BN5[..., :1], boxes_BN5[..., 1:]], -1)


def of_known_findings(boxes_BN6: Tensor, known_BF: Tensor) -> Tensor:
    """Predicted boxes of findings whose locations are known in their image; NaN in place of the others."""
    finding = boxes_BN6[..., 5].nan_to_num(0).long()
    return torch.where(known_BF.gather(1, finding)[..., None], boxes_BN6, torch.nan)


def first_boxes(boxes_BN5: Tensor) -> Tensor:
    """Boxes moved in front of NaN rows, in the same order."""
    order = torch.argsort(boxes_BN5[..., 0].isnan(), dim=1, stable=True)[..., None]
    return boxes_BN5.gather(1, order.expand(-1, -1, 5))


def shown_boxes(boxes_BN6: Tensor) -> Tensor:
    """Boxes (B, N, 4) whose score is high enough for a picture; NaN in place of the others."""
    return torch.where(boxes_BN6[..., 4:5] >= SHOWN_SCORE, boxes_BN6[..., :4], torch.nan)
