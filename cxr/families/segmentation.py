"""What the families that find a mask have in common: settings, networks, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.augment.image_mask import Variation
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families.base import Recipe, ScoringContext, Stage, one_of, unit_pixels
from cxr.families.segmentation_task import Lesson, SegmentationTask, outlined, rule_of
from cxr.imaging.geometry import ResizeTransform, mask_to_original
from cxr.metrics.segmentation.mask_thresholds import MaskRule
from cxr.models import pretrained
from cxr.models.fcn import FcnBackbone, FcnStride, FullyConvolutional, Upsampling
from cxr.models.pretrained import Weights
from cxr.models.segmentation_loss import MaskLoss
from cxr.models.segmentation_model import SegmentationModel
from cxr.models.smp_unet import Segmenter
from cxr.models.unet import UNET_ENCODERS, SmallUNet, UNet
from cxr.sources import rle

Architecture = Literal["small_unet", "unet", "fcn32s", "fcn16s", "fcn8s"]
_STRIDES: dict[str, FcnStride] = {"fcn32s": 32, "fcn16s": 16, "fcn8s": 8}
SHARES = "shares"  # what `predict` gives besides the image's probability


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """Finds one kind of mask."""

    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.MASKS)
    score_columns: ClassVar[pa.Schema] = schema.MASK_SCORES
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "backbone_weights")
    depends_on: ClassVar[Mapping[str, str]] = {"positive_weight": "bce"}
    measures_distance: ClassVar[bool] = False
    """Whether validation also measures how far outlines lie apart (HD95)."""
    rule: ClassVar[MaskRule] = MaskRule()
    """By which probabilities become masks, before training has chosen another."""
    chooses_rule: ClassVar[bool] = False
    """Whether each validation chooses the rule anew."""

    architecture: Architecture = "unet"
    """small_unet: 1.3 million parameters, for CPUs; unet: on a ResNet; fcn32s, fcn16s, fcn8s: Long et al. 2015."""
    backbone: FcnBackbone = "resnet34"
    """Network of torchvision on which a U-Net (ResNets only) or FCN stands."""
    attention: Literal["none", "scse"] = "none"
    """Of the U-Net's decoder: none, or channels and places weighed (scSE)."""
    upsampling: Upsampling = "published"
    """Which of an FCN's enlargements learn: published (all but the last), learnt (all), fixed (none)."""
    fully_connected: bool = True
    """Keep AlexNet's and VGG16's fully connected layers, as convolutions: most of their parameters."""
    backbone_weights: str = ""
    """Weights that the backbone starts from: a path or URI of a state dict or checkpoint, or a torchvision name
    (IMAGENET1K_V1); auto takes torchvision's where they can be fetched. Empty: random weights."""
    freeze_backbone: bool = False
    """Leave the backbone as it begins."""

    bce: float = 1.0
    """Weight of the pixels' cross-entropy."""
    dice: float = 1.0
    """Weight of the soft Dice loss."""
    focal: float = 0.0
    """Weight of the focal loss."""
    positive_weight: float = 1.0
    """Of a pixel of the mask in the cross-entropy, beside 1 for any other."""
    image_weight: float = 0.0
    """Weight of telling whether the image has a mask at all; 0: that is not learnt."""

    first_size: int = 0
    """Size at which training begins, pixels, before that of `size`; 0 for none."""
    first_epochs: int = 0
    """Epochs at `first_size`."""

    flip: float = 0.5
    """Augmentation: share of images that are mirrored."""
    rotation_deg: float = 10.0
    """Augmentation: largest rotation."""
    scale: float = 1.1
    """Augmentation: largest enlargement, and reduction, of either axis."""
    shift: float = 0.05
    """Augmentation: largest shift, as a share of the width."""
    elastic: float = 0.01
    """Augmentation: largest standard deviation of a smooth displacement, as a share of the width."""
    gamma: float = 1.3
    """Augmentation: largest exponent of gray values."""
    contrast: float = 0.2
    """Augmentation: largest change of contrast, as a share."""
    brightness: float = 0.1
    """Augmentation: largest change of brightness, of 1."""
    noise: float = 0.02
    """Augmentation: largest standard deviation of noise, of 1."""
    flip_test: bool = True
    """Average probabilities over the image and its mirror image in validation and use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("architecture", self.architecture, get_args(Architecture))
        one_of("backbone", self.backbone, UNET_ENCODERS if self.architecture == "unet" else get_args(FcnBackbone))
        one_of("attention", self.attention, ("none", "scse"))
        one_of("upsampling", self.upsampling, get_args(Upsampling))
        if self.first_size > self.size or min(self.first_size, self.first_epochs, self.image_weight) < 0:
            raise UserError(
                f"first_size={self.first_size}, first_epochs={self.first_epochs}, image_weight={self.image_weight}: "
                f"wanted none negative, and first_size at most size={self.size}"
            )
        if bool(self.first_size) != bool(self.first_epochs):
            raise UserError(
                f"first_size={self.first_size}, first_epochs={self.first_epochs}: wanted both, or neither"
            )
        if self.freeze_backbone and not self.backbone_weights:
            raise UserError(
                f"freeze_backbone without backbone_weights: {self.backbone} would stay as chance made it. Give "
                f"backbone_weights, a name of torchvision or a URI"
            )
        try:
            _ = self._loss(), self._variation()
        except ValueError as error:
            raise UserError(str(error)) from error

    def _loss(self) -> MaskLoss:
        return MaskLoss(self.bce, self.dice, self.focal, self.positive_weight)

    def _variation(self) -> Variation:
        names = {field.name for field in fields(Variation)} & {field.name for field in fields(self)}
        return Variation(**{name: getattr(self, name) for name in names})

    @property
    def monitor(self) -> str:
        return "dice"

    def stages(self) -> tuple[Stage, ...]:
        first = (Stage(f"{self.first_size} px", self.first_epochs, self.lr),) if self.first_size else ()
        return (*first, Stage(f"{self.size} px", self.epochs, self.lr))

    def network(self, findings: Any) -> SegmentationModel:
        segmenter = self.segmenter()
        segmenter.freeze_backbone(self.freeze_backbone)
        if not self.image_weight:
            segmenter.image_head.requires_grad_(False)
        return SegmentationModel(segmenter, tuple(self.rule.describe().values()))

    def segmenter(self) -> Segmenter:
        if self.architecture == "small_unet":
            return SmallUNet()
        if self.architecture == "unet":
            return UNet(self.backbone, self.attention)  # pyright: ignore[reportArgumentType]
        return FullyConvolutional(self.backbone, _STRIDES[self.architecture], self.upsampling, self.fully_connected)

    def task(self, network: nn.Module) -> SegmentationTask:
        lesson = Lesson(
            mask_label=self.mask_label,
            size=self.size,
            first_size=self.first_size,
            first_stage=f"{self.first_size} px",
            loss=self._loss(),
            image_weight=self.image_weight,
            variation=self._variation(),
            flip_test=self.flip_test,
            rule=None if self.chooses_rule else self.rule,
            distances=self.measures_distance,
        )
        return SegmentationTask(network, lesson, self._start)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Shares of pixels (B, size, size), of which a mask has those from one half; 0 where there is none."""
        p, image = self._probabilities(network, batch)
        rule = rule_of(network)
        kept = rule.apply(p).flatten(1).any(1)[:, None, None]
        return {
            SHARES: torch.where(kept, p - rule.bottom + 0.5, 0.0),
            schema.PRED_MASK_PROBABILITY: image if self.image_weight else torch.full_like(image, math.nan),
        }

    def _probabilities(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(network, SegmentationModel)
        return network.probabilities(unit_pixels(batch, self.size), mirrored=self.flip_test)

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        shares = predicted[SHARES].cpu().numpy()
        zoom = ResizeTransform(context.stored_size / self.size, context.stored_size / self.size)
        places = (rows[name].to_pylist() for name in (schema.RESIZE_TRANSFORM, schema.HEIGHT_PX, schema.WIDTH_PX))
        found = [
            self._coded(share, zoom.then(ResizeTransform(**frame)), height, width)
            for share, frame, height, width in zip(shares, *places, strict=True)
        ]
        columns = {
            schema.PRED_MASK_RLE: [code for code, _ in found],
            schema.PRED_MASK_AREA_PX: [area for _, area in found],
            schema.PRED_MASK_PROBABILITY: predicted[schema.PRED_MASK_PROBABILITY].float().cpu().numpy(),
        }
        return pa.table(columns, schema=self.score_columns)

    def _coded(self, shares_HW: np.ndarray, frame: ResizeTransform, height: int, width: int) -> tuple[str, int]:
        """The mask's code and area on the original image."""
        if shares_HW.max() < 0.5:
            return rle.EMPTY, 0
        mask = mask_to_original(self.cleaned(shares_HW), frame, height, width)
        return rle.encode(mask), int(mask.sum())

    def cleaned(self, shares_HW: np.ndarray) -> np.ndarray:
        """Shares without what cannot belong to the mask."""
        return shares_HW

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """overlay: the image with the outline of what was found, (B, size, size, 3)."""
        p, _ = self._probabilities(network, batch)
        return {"overlay": outlined(unit_pixels(batch, self.size), rule_of(network).apply(p))}

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate and loss weights."""
        space: dict[str, BaseDistribution] = {
            "lr": FloatDistribution(1e-4, 5e-3, log=True),
            "positive_weight": FloatDistribution(1, 10, log=True),
        }
        others = self.bce, self.focal, self.image_weight
        return space | ({"dice": FloatDistribution(0.25, 4, log=True)} if any(others) else {})

    def initial_weights(self) -> dict[str, str]:
        return {"backbone_weights": "" if self.architecture == "small_unet" else self.backbone}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        self.segmenter().load_backbone(given.state)
        return given.state

    def without_weights(self, setting: str) -> Self | None:
        return None if self.freeze_backbone else super().without_weights(setting)

    def _start(self, network: SegmentationModel) -> None:
        if self.backbone_weights:
            network.segmenter.load_backbone(pretrained.from_uri(self.backbone_weights))
