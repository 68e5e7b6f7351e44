"""What families that segment one kind of mask share: `lungs` and `pneumothorax`.

A network gives each pixel a probability and, if `image_weight` is set, one to the image as a whole. A rule with three
thresholds turns the probabilities into a mask (`metrics.segmentation.mask_thresholds`). Images without known masks
are not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.augment.image_mask import Variation, augment_with_masks
from cxr.data.batch import NO_MASK, Batch
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Recipe, ScoringContext, Stage, Task, one_of, unit_pixels
from cxr.families.capabilities import mean_predictions
from cxr.families.outlines import TRUTH_COLOR, outlined_masks
from cxr.imaging.geometry import ResizeTransform, mask_to_original
from cxr.metrics.segmentation import hd95_rows, image_level, summary
from cxr.metrics.segmentation.mask_thresholds import MaskRule, apply_rule, choose_rule, decided, rule_rows
from cxr.models import pretrained
from cxr.models.fcn import HALF, FcnBackbone, FcnStride, FullyConvolutional, Upsampling
from cxr.models.input_contract import IMAGENET, InputContract
from cxr.models.pretrained import Fit, Weights
from cxr.models.segmentation_loss import MaskLoss, image_loss
from cxr.models.segmentation_model import SegmentationModel, Segmenter
from cxr.models.unet import UNET_BACKBONES, SmallUNet, UNet
from cxr.reporting import figures
from cxr.sources import rle

Architecture = Literal["small_unet", "unet", "fcn32s", "fcn16s", "fcn8s"]
FCN_STRIDES: dict[str, FcnStride] = {"fcn32s": 32, "fcn16s": 16, "fcn8s": 8}
PIXEL_PROBABILITIES = "pixel_probabilities"  # of raw predictions: (B, size, size)
MASK_VALUES = "mask_values"  # from `predict`: (B, size, size); a mask contains the pixels from .5 on
SHOWN_IMAGES = 6


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """Segments one kind of mask."""

    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.MASKS)
    score_columns: ClassVar[pa.Schema] = schema.MASK_SCORES
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "backbone_pretrained")
    depends_on: ClassVar[Mapping[str, str]] = {"positive_weight": "bce_weight"}
    decision_buffers: ClassVar[tuple[str, ...]] = ("rule",)
    measures_distance: ClassVar[bool] = False
    """Whether validation also measures the distance between outlines (HD95)."""
    rule: ClassVar[MaskRule] = MaskRule()
    """The rule that turns probabilities into masks, until validation chooses another."""
    chooses_rule: ClassVar[bool] = False
    """Whether every validation chooses the rule."""

    architecture: Architecture = "unet"
    """Network: small_unet (1.3 million parameters, for CPUs), unet (on a ResNet), or fcn32s, fcn16s or fcn8s (Long et
    al. 2015)."""
    backbone: FcnBackbone = "resnet34"
    """torchvision network that is the encoder of a U-Net (ResNets only) or the backbone of an FCN."""
    attention: Literal["none", "scse"] = "none"
    """Attention in the U-Net's decoder. scse weights channels and positions."""
    upsampling: Upsampling = "published"
    """Which of an FCN's upsampling layers are learned: published (all except the last), learned (all) or fixed
    (none)."""
    fully_connected: bool = True
    """Keep the fully connected layers of AlexNet and VGG16, as convolutions. They contain most of the parameters."""
    backbone_pretrained: str = ""
    """Initial weights of the backbone: a path or URI of a state dict or checkpoint, or a torchvision name such as
    IMAGENET1K_V1. auto uses torchvision's weights if they can be downloaded. Empty: random weights."""
    freeze_backbone: bool = False
    """Keep the backbone's weights fixed in training."""

    bce_weight: float = 1.0
    """Weight of the pixelwise cross-entropy."""
    dice_weight: float = 1.0
    """Weight of the soft Dice loss."""
    focal_weight: float = 0.0
    """Weight of the focal loss."""
    positive_weight: float = 1.0
    """Weight of the pixels of the mask in the cross-entropy. Other pixels have weight 1."""
    image_weight: float = 0.0
    """Loss weight of the second output, which predicts whether the mask is not empty. 0: no second output."""

    warmup_size: int = 0
    """Input size in pixels of a first stage, before training at --size (progressive resizing). 0: no such stage."""
    warmup_epochs: int = 0
    """Number of epochs at --warmup-size."""

    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    rotation_deg: float = 10.0
    """Augmentation: maximum rotation in degrees."""
    max_zoom: float = 1.1
    """Augmentation: maximum zoom factor of either axis, in and out."""
    translate: float = 0.05
    """Augmentation: maximum translation as a fraction of the width."""
    elastic: float = 0.01
    """Augmentation: maximum standard deviation of the elastic deformation, as a fraction of the width."""
    gamma: float = 1.3
    """Augmentation: maximum exponent of gray values."""
    contrast: float = 0.2
    """Augmentation: maximum change of contrast, as a fraction."""
    brightness: float = 0.1
    """Augmentation: maximum change of brightness, with gray values in [0, 1]."""
    noise: float = 0.02
    """Augmentation: maximum standard deviation of noise, with gray values in [0, 1]."""
    tta_flip: bool = True
    """Average the probabilities over the image and its mirror image in validation and scoring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("architecture", self.architecture, get_args(Architecture))
        one_of("backbone", self.backbone, UNET_BACKBONES if self.architecture == "unet" else get_args(FcnBackbone))
        one_of("attention", self.attention, ("none", "scse"))
        one_of("upsampling", self.upsampling, get_args(Upsampling))
        for name in ("warmup_size", "warmup_epochs", "image_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.warmup_size > self.size:
            raise UserError(f"warmup_size: expected at most size={self.size}, got {self.warmup_size}")
        if bool(self.warmup_size) != bool(self.warmup_epochs):
            raise UserError(
                f"expected both or neither of warmup_size and warmup_epochs, got {self.warmup_size} and "
                f"{self.warmup_epochs}"
            )
        if self.freeze_backbone and not self.backbone_pretrained:
            raise UserError(
                f"freeze_backbone without backbone_pretrained: {self.backbone} would stay randomly initialized. Set "
                f"backbone_pretrained, a torchvision name or a URI"
            )
        try:
            _ = self.loss, self.variation
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def input_contract(self) -> InputContract:
        if self.architecture == "small_unet":
            return super().input_contract
        googlenet = self.architecture != "unet" and self.backbone == "googlenet"
        return (HALF if googlenet else IMAGENET).replace(size=self.size)

    @property
    def loss(self) -> MaskLoss:
        return MaskLoss(
            bce_weight=self.bce_weight,
            dice_weight=self.dice_weight,
            focal_weight=self.focal_weight,
            positive_weight=self.positive_weight,
        )

    @property
    def variation(self) -> Variation:
        return Variation(
            flip=self.flip,
            rotation_deg=self.rotation_deg,
            max_zoom=self.max_zoom,
            translate=self.translate,
            elastic=self.elastic,
            gamma=self.gamma,
            contrast=self.contrast,
            brightness=self.brightness,
            noise=self.noise,
        )

    @property
    def monitor(self) -> str:
        return "dice"

    @property
    def warmup_stage(self) -> str:
        """The name of the first stage, if there are two."""
        return f"warmup at {self.warmup_size} px"

    def stages(self) -> tuple[Stage, ...]:
        warmup = (Stage(self.warmup_stage, self.warmup_epochs, self.lr),) if self.warmup_size else ()
        return (*warmup, Stage(f"{self.size} px", self.epochs, self.lr))

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
        stride = FCN_STRIDES[self.architecture]
        return FullyConvolutional(self.backbone, stride, self.upsampling, self.fully_connected)

    def task(self, network: nn.Module) -> SegmentationTask:
        return SegmentationTask(self, network)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.decide(self.raw_predictions(network, batch), network)

    # ---- Ensembles: `capabilities.Combinable`

    def shared_settings(self) -> tuple[str, ...]:
        return ("size", "image_weight")

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.raw_from(network, unit_pixels(batch, self.size))

    def raw_from(self, network: nn.Module, x_B1HW: Tensor) -> dict[str, Tensor]:
        """Probabilities of pixels (B, H, W) and of images (B,), the latter NaN without `image_weight`."""
        pixels, image = self.probabilities(network, x_B1HW)
        image = image if self.image_weight else torch.full_like(image, math.nan)
        return {PIXEL_PROBABILITIES: pixels, schema.PRED_MASK_PROBABILITY: image}

    def mask_probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.raw_predictions(network, batch)[PIXEL_PROBABILITIES]

    def combine(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return mean_predictions(members)

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """Values of the pixels (B, size, size), of which a mask contains those from .5 on; 0 if the mask is empty."""
        p, bottom = raw[PIXEL_PROBABILITIES], network.get_buffer("rule")[2]
        present = predicted_masks(network, p).flatten(1).any(1)[:, None, None]
        return {
            MASK_VALUES: torch.where(present, p - bottom + 0.5, 0.0),
            schema.PRED_MASK_PROBABILITY: raw[schema.PRED_MASK_PROBABILITY],
        }

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """overlay: the image with the outline of the predicted mask, (B, size, size, 3)."""
        masks = predicted_masks(network, raw[PIXEL_PROBABILITIES])
        return {"overlay": outlined_masks(unit_pixels(batch, self.size), masks)}

    def raw_evaluation(self, network: nn.Module) -> SegmentationTask:
        return SegmentationTask(self, network)

    # ---- Scoring

    def probabilities(self, network: nn.Module, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (B, H, W) and images (B,)."""
        assert isinstance(network, SegmentationModel)
        return network.probabilities(x_B1HW, mirrored=self.tta_flip)

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        values = predicted[MASK_VALUES].cpu().numpy()
        zoom = ResizeTransform(context.stored_size / self.size, context.stored_size / self.size)
        originals = (rows[name].to_pylist() for name in (schema.RESIZE_TRANSFORM, schema.HEIGHT_PX, schema.WIDTH_PX))
        least = context.thresholds.get(self.mask_label, 0.0)
        encoded = [
            self._encoded(values_HW, least, zoom.then(ResizeTransform.from_dict(transform)), height, width)
            for values_HW, transform, height, width in zip(values, *originals, strict=True)
        ]
        columns = {
            schema.PRED_MASK_RLE: [code for code, _ in encoded],
            schema.PRED_MASK_AREA_PX: [area for _, area in encoded],
            schema.PRED_MASK_PROBABILITY: predicted[schema.PRED_MASK_PROBABILITY].float().cpu().numpy(),
        }
        return pa.table(columns, schema=self.score_columns)

    def _encoded(
        self, values_HW: np.ndarray, least: float, transform: ResizeTransform, height: int, width: int
    ) -> tuple[str, int]:
        """The run-length code and the area of the mask in the original image.

        Args:
            least: share of the image below which a mask is emptied.
        """
        if values_HW.max() < 0.5:
            return rle.EMPTY, 0
        mask = mask_to_original(self.cleaned(values_HW), transform, height, width)
        area = int(mask.sum())
        return (rle.encode(mask), area) if area >= least * height * width else (rle.EMPTY, 0)

    def cleaned(self, values_HW: np.ndarray) -> np.ndarray:
        """The values without parts that cannot belong to the mask."""
        return values_HW

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `draw`."""
        return self.draw(self.raw_predictions(network, batch), network, batch)

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate and loss weights."""
        space: dict[str, BaseDistribution] = {
            "lr": FloatDistribution(1e-4, 5e-3, log=True),
            "positive_weight": FloatDistribution(1, 10, log=True),
        }
        if self.bce_weight or self.focal_weight or self.image_weight:
            space["dice_weight"] = FloatDistribution(0.25, 4, log=True)
        return space

    def initial_weights(self) -> dict[str, str]:
        return {"backbone_pretrained": "" if self.architecture == "small_unet" else self.backbone}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        return replace(self.segmenter().load_backbone(weights.state), state=weights.state)

    def without_weights(self, setting: str) -> Self | None:
        return None if self.freeze_backbone else super().without_weights(setting)


class SegmentationTask(Task):
    """A segmentation model in training."""

    def __init__(self, recipe: SegmentationRecipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.loss, self.network = recipe, recipe.loss, network
        self.size = recipe.size  # of the current stage
        self.rule = None if recipe.chooses_rule else recipe.rule

    @property
    def _rule(self) -> Tensor:
        """The network's rule; see `SegmentationModel`."""
        return self.network.get_buffer("rule")

    def enter_stage(self, stage: str) -> None:
        self.size = self.recipe.warmup_size if stage == self.recipe.warmup_stage else self.recipe.size

    def begin(self, batches: Batches, workers: Communicator) -> None:
        if self.recipe.backbone_pretrained:
            assert isinstance(self.network, SegmentationModel)
            self.network.segmenter.load_backbone(pretrained.from_uri(self.recipe.backbone_pretrained))
        known = any(bool((batch[schema.MASKS][:, 0, 0] != NO_MASK).any()) for batch in batches())
        if not workers.sum(torch.tensor(float(known), device=self._rule.device)).item():
            raise UserError(
                f"expected masks of {self.recipe.mask_label}, got a train split without any: use an archive whose "
                f"source has such masks"
            )

    def augmented(self, batch: Batch) -> Batch:
        x, mask = augment_with_masks(*images_and_masks(batch, self.size), self.recipe.variation)
        return batch | {schema.PIXELS: x[:, 0], schema.MASKS: mask[:, 0]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x, mask = images_and_masks(batch, self.size)
        logits, image = self.network(x)
        terms = self.loss(logits, mask)
        if self.recipe.image_weight:
            terms["image"] = self.recipe.image_weight * image_loss(image, _presence(mask))
        return terms

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Overlap of predicted and ground-truth masks over images whose mask is known; see
        `metrics.segmentation.summary`.

        image_auroc, image_sensitivity and image_specificity are about images with and without a mask. hd95_px, the
        mean over images for which it is defined, is in pixels of the network's input.
        """
        return self.evaluate_raw(map(self._evaluated, _with_masks(batches())), workers)

    def _evaluated(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """A batch and its raw predictions, at the size of the stage."""
        return batch, self.recipe.raw_from(self.network, unit_pixels(batch, self.size))

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        device = self._rule.device
        empty = torch.zeros(0, device=device)  # for workers without images
        counts = [rule_rows(empty.view(0, 1, 1), empty.view(0, 1, 1))]
        images, distances = [empty], [torch.zeros(0, dtype=torch.float64)]
        for batch, raw in predictions:
            mask = resized_masks(batch, raw[PIXEL_PROBABILITIES].shape[-1])
            known = mask[:, 0, 0, 0] != NO_MASK
            p, true = raw[PIXEL_PROBABILITIES][known], mask[known, 0] == 1
            counts.append(rule_rows(p, true))
            images.append(raw[schema.PRED_MASK_PROBABILITY][known])
            if self.recipe.measures_distance:
                distances.append(hd95_rows((self.rule or MaskRule()).apply(p), true))
        rows = workers.gather(torch.cat(counts))
        if self.recipe.chooses_rule and len(rows):
            self.rule = choose_rule(rows)
            self._rule.copy_(torch.tensor(tuple(self.rule.describe().values()), dtype=torch.float64))
        overlaps = decided(rows, self.rule or MaskRule())
        probabilities = workers.gather(torch.cat(images)) if self.recipe.image_weight else None
        metrics = summary(overlaps) | image_level(overlaps, probabilities)
        if self.recipe.measures_distance:
            metrics["hd95_px"] = float(workers.gather(torch.cat(distances).to(device)).nanmean())
        return {name: value for name, value in metrics.items() if not math.isnan(value) or name == "dice"}

    def describe(self) -> dict[str, Any]:
        return {"mask_rule": self.rule.describe()} if self.rule else {}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """masks.png: images, true outlines and predicted outlines; images with a mask come first."""
        batch = next(iter(batches()))
        x, mask = images_and_masks(batch, self.recipe.size)
        order = torch.argsort((mask == 1).flatten(1).any(1).int(), descending=True, stable=True)[:SHOWN_IMAGES]
        x, mask = x[order], mask[order, 0] == 1
        p, _ = self.recipe.probabilities(self.network, x)
        rows = {
            "image": x[:, 0],
            "ground-truth mask": outlined_masks(x, mask, TRUTH_COLOR) / 255,
            "predicted mask": outlined_masks(x, predicted_masks(self.network, p)) / 255,
        }
        shown = {name: images.cpu().numpy() for name, images in rows.items()}
        figure = figures.picture_rows(shown, [image_ids[int(i)] for i in order])
        figures.save_figure(figure, str(folder), "masks.png")


def predicted_masks(network: nn.Module, probabilities_BHW: Tensor) -> Tensor:
    """Bool masks (B, H, W), by the network's own rule."""
    top, min_area, bottom = network.get_buffer("rule").unbind()
    return apply_rule(probabilities_BHW, top, min_area, bottom)


def _with_masks(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The images whose mask is known, without batches in which none is."""
    for batch in batches:
        known = batch[schema.MASKS][:, 0, 0] != NO_MASK
        if known.any():
            yield {name: batch[name][known] for name in (schema.PIXELS, schema.MASKS)}


def images_and_masks(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, size, size) in [0, 1], and `resized_masks`."""
    return unit_pixels(batch, size), resized_masks(batch, size)


def resized_masks(batch: Batch, size: int) -> Tensor:
    """A batch's masks, uint8 (B, 1, size, size) with values 0 and 1, or `NO_MASK` everywhere if unknown."""
    mask = batch[schema.MASKS][:, None]
    if mask.shape[-1] == size:
        return mask
    coverage = F.interpolate(mask.float(), size=(size, size), mode="area")
    return torch.where(coverage > 1, NO_MASK, (coverage >= 0.5).to(torch.uint8))


def _presence(mask_B1HW: Tensor) -> Tensor:
    """(B,) 1 if the mask is not empty, 0 if it is, −1 if it is unknown."""
    any_B = (mask_B1HW == 1).flatten(1).any(1)
    return torch.where(mask_B1HW[:, 0, 0, 0] == NO_MASK, schema.UNKNOWN, any_B.int())
