"""Family `align`: brings frontal chest X-rays into one common frame, trained on the images alone.

A spatial transformer (Jaderberg et al. 2015) sees each image together with the lung fields that a small U-Net
predicts in it, and is trained so that its outputs resemble a target. No labels and no real lung masks are needed: the
U-Net was trained on phantoms. docs/decisions/0003 says how the defaults were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pyarrow as pa
import torch
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cxr import schema, storage
from cxr.augment.affine_exposure import random_affine, random_exposure
from cxr.data.batch import NO_MASK, Batch
from cxr.errors import UserError
from cxr.families import lung_pretraining, optimizers
from cxr.families.align_target import feature_network, lung_crops, read_target
from cxr.families.base import Batches, Communicator, Recipe, Stage, Task, one_of, unit_pixels
from cxr.families.capabilities import AdamWWithCosine
from cxr.families.lung_pretraining import SHIPPED, LungTraining
from cxr.metrics import alignment
from cxr.metrics.meters import Mean
from cxr.models import perceptual, pretrained
from cxr.models.backbones import BACKBONES, POOLINGS, BackboneName, Pooling, make_backbone, normalize_contrast
from cxr.models.perceptual import FeatureKind, as_unit, feature_distance
from cxr.models.pretrained import Fit, Weights
from cxr.models.small_unet import LARGEST_PX, LungField, soft_dice
from cxr.models.spatial_transformer import (
    PARAMETERS,
    Parameterization,
    SpatialTransformer,
    compose,
    corner_distance,
    frame_distance,
    identity,
    invert,
    warp,
)
from cxr.reporting import figures

TargetStrategy = Literal["mean", "lung_crops", "features", "structure"]
Decay = Literal["cosine", "linear"]
TRAIN = "train"  # value of `lung_pretrained`

NEIGHBORHOODS = (0.12, 0.4)  # sides of the squares in which structure is compared, as fractions of the width
COMPARED_MASKS = 512  # of all workers together
WARPS_PER_IMAGE = 4  # random warps of each validation image, whose lungs must be aligned to the same place
WARPS, WARPED = "warps", "warped"  # columns of an augmented batch; see `AlignTask.augmented`
AVERAGED_IMAGES = 64  # images in the mean images before and after alignment
SHOWN_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class AlignRecipe(Recipe):
    """Aligns X-rays with a spatial transformer that uses lung masks. The defaults take minutes on two CPU cores."""

    family: ClassVar[str] = "align"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.TRUE_THETA, schema.MASKS)
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (
        *Recipe.LOCATION_SETTINGS,
        "backbone_pretrained",
        "lung_pretrained",
        "feature_pretrained",
    )
    score_columns: ClassVar[pa.Schema] = pa.schema([(schema.THETA, pa.list_(pa.float32(), 6))])
    depends_on: ClassVar[Mapping[str, str]] = dict.fromkeys(("feature_network", "feature_layers"), "feature_weight")
    loss_scale: ClassVar[float] = 1.0
    ema_ramp: ClassVar[float] = 0.0

    size: int = 128
    epochs: int = 40
    batch_size: int = 16
    lr: float = 2e-3

    parameterization: Parameterization = "anisotropic"
    """Kind of transform: similarity (4 parameters), anisotropic (5, with two scales) or affine (6, with shear)."""
    backbone: BackboneName = "conv5"
    """Backbone of the localization network: a small network of 3 to 6 blocks, or a ResNet."""
    iterations: int = 3
    """Number of times the network is applied, each time to the image aligned so far."""
    reduction: int = 2
    """Factor by which the image and the lung map are reduced for the localization network, to save time."""
    pooling: Pooling = "grid"
    """Pooling between the backbone and the hidden layer. grid: the means of 4 x 4 cells; mean: the global mean, as in
    classifiers trained on ImageNet."""
    backbone_pretrained: str = ""
    """Initial weights of a ResNet: a path or URI of a state dict or checkpoint, or a torchvision name such as
    IMAGENET1K_V1. auto uses torchvision's weights if they can be downloaded. Empty: random weights."""
    decay: Decay = "cosine"
    """Learning rate schedule, down to 0. cosine: after a warmup; linear: from the first step, without a warmup."""
    output_width: int = 0
    """Width in pixels of the aligned images in the loss and in saved images; their height is --size. 0: square."""
    target: TargetStrategy = "structure"
    """What images are aligned to. mean: the mean image; lung_crops: the mean of the images cropped to their lungs;
    features: the mean of the images' features; structure: the mean of the aligned images, updated after every
    epoch."""
    target_uri: str = ""
    """Path or URI of a saved target.pt to align to, which is never updated. Empty: the target of --target."""

    lungs: bool = True
    """Use a map of the lung fields as an input of the network and in the loss. Without it, only the images are
    compared."""
    lung_pretrained: str = SHIPPED
    """Weights of the lung network for --lungs and --target lung_crops. phantoms: the network that ships with cxr and
    was trained on phantoms only. train: train one on phantoms first, at this input size. Otherwise, the path or URI
    of a state dict or of an aligner's checkpoint."""
    lung_phantoms: int = 1000
    """Number of phantoms to train the lung network on, with --lung-pretrained train."""
    lung_steps: int = 500
    """Number of training steps of the lung network, with 16 phantoms each, with --lung-pretrained train."""

    feature_network: FeatureKind = "local"
    """Network of the perceptual loss. local needs no weights; lungs is the encoder of a lung network."""
    feature_pretrained: str = pretrained.AUTO
    """Weights of the feature network: a path or URI of a state dict or checkpoint, or a torchvision name such as
    IMAGENET1K_V1. auto: the lung network that ships with cxr for --feature-network lungs; for other networks,
    torchvision's weights if they can be downloaded, otherwise --feature-network local."""
    feature_sha256: Annotated[str, tyro.conf.Suppress] = ""
    """SHA-256 of those weights, set by `resolve_weights`."""
    feature_layers: int = 3
    """Number of layers whose features are compared."""
    first_feature_layer: int = 1
    """Index of the shallowest of these layers, from 1. For vgg16, 2 is relu2_2."""

    overlap_weight: float = 10.0
    """Weight of the overlap loss: 1 − Dice of the lung fields and those of the target."""
    pixel_weight: float = 0.0
    """Weight of the pixel loss: squared difference of the image and the target, both contrast-normalized."""
    feature_weight: float = 0.0
    """Weight of the perceptual loss: squared difference of the features of the image and the target."""
    structure_weight: float = 0.3
    """Weight of the structure loss: 1 − local correlation of the image and the target, at two scales."""
    equivariance_weight: float = 3.0
    """Weight of the equivariance loss: distance between the alignments of two random warps of an image. 0: each
    image is warped once."""
    identity_weight: float = 1.0
    """Weight of the identity loss: distance of a batch's mean transform from the identity. It keeps the common frame
    in place."""

    rotation_deg: float = 15.0
    """Augmentation: maximum rotation in degrees."""
    max_zoom: float = 1.25
    """Augmentation: maximum zoom factor, in and out."""
    translate: float = 0.1
    """Augmentation: maximum translation as a fraction of the width."""
    gamma: float = 1.5
    """Augmentation: maximum gamma, and its inverse the minimum. 1: only brightness and contrast change."""
    noise: float = 0.02
    """Augmentation: maximum standard deviation of noise; white is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aligner:
            raise UserError(f"aligner: expected nothing, got {self.aligner}. An aligner is trained on whole images")
        one_of("parameterization", self.parameterization, tuple(PARAMETERS))
        one_of("backbone", self.backbone, BACKBONES)
        one_of("pooling", self.pooling, POOLINGS)
        one_of("decay", self.decay, get_args(Decay))
        one_of("target", self.target, get_args(TargetStrategy))
        one_of("feature_network", self.feature_network, perceptual.KINDS)
        for name in ("iterations", "reduction", "lung_phantoms", "lung_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.output_width < 0:
            raise UserError(f"output_width: expected a width in pixels, or 0, got {self.output_width}")
        if not (1 <= self.gamma < math.inf and 0 <= self.noise < 1):
            raise UserError(f"expected gamma >= 1 and noise from 0 to 1, got {self.gamma:g} and {self.noise:g}")
        deepest = perceptual.DEEPEST[self.feature_network]
        if not 1 <= self.first_feature_layer <= self.last_feature_layer <= deepest:
            raise UserError(
                f"feature_layers: expected layers from 1 to {deepest} for feature_network={self.feature_network}, "
                f"got {self.feature_layers} from layer {self.first_feature_layer} on"
            )
        if self.backbone_pretrained and not self.torchvision_backbone:
            raise UserError(f"backbone_pretrained: expected a ResNet as backbone, got {self.backbone}")
        is_auto = self.feature_pretrained == pretrained.AUTO
        if self.feature_network == "lungs" and not (is_auto or pretrained.is_uri(self.feature_pretrained)):
            raise UserError(
                f"feature_pretrained: expected auto, or the URI of an aligner's checkpoint, for "
                f"feature_network=lungs, got {self.feature_pretrained!r}"
            )
        if self.feature_network != "local" and not self.feature_pretrained:
            raise UserError(
                f"feature_pretrained: expected a path, a URI or a torchvision name for "
                f"feature_network={self.feature_network}, got nothing"
            )
        if self.lung_pretrained not in (SHIPPED, TRAIN) and not pretrained.is_uri(self.lung_pretrained):
            raise UserError(
                f"lung_pretrained: expected {SHIPPED}, {TRAIN}, or a path or URI, got {self.lung_pretrained!r}. "
                f"Begin the path of a file in the working directory with ./"
            )
        weights = (
            self.overlap_weight * self.lungs,
            self.pixel_weight,
            self.feature_weight,
            self.structure_weight,
            self.equivariance_weight,
            self.identity_weight,
        )
        if min(self.overlap_weight, *weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UserError(
                f"expected loss weights of 0 or more, and at least one above 0, got overlap, pixel, feature, "
                f"structure, equivariance and identity weights of {', '.join(f'{weight:g}' for weight in weights)}"
            )

    @property
    def monitor(self) -> str:
        return "pairwise_lung_iou" if self.lungs else "group_correlation"

    @property
    def output_shape(self) -> tuple[int, int]:
        """Height and width in pixels of the aligned images that are compared with the target."""
        return self.size, self.output_width or self.size

    @property
    def last_feature_layer(self) -> int:
        return self.first_feature_layer + self.feature_layers - 1

    @property
    def torchvision_backbone(self) -> str:
        """The backbone's name in torchvision; empty for the small networks."""
        return self.backbone if self.backbone.startswith("resnet") else ""

    def network(self, findings: Sequence[str]) -> SpatialTransformer:
        lungs = LungField() if self.lungs else None
        backbone = make_backbone(self.backbone, channels=1 + self.lungs, pooling=self.pooling)
        return SpatialTransformer(backbone, self.parameterization, self.iterations, lungs, self.reduction)

    def task(self, network: nn.Module) -> AlignTask:
        return AlignTask(self, network)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {schema.THETA: network(unit_pixels(batch, self.size)).reshape(-1, 6)}

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """aligned: the images as stored, aligned, (B, H, W), in the shape of the output."""
        theta, stored_size = network(unit_pixels(batch, self.size)), batch[schema.PIXELS].shape[-1]
        height, width = self.output_shape
        aligned = warp(unit_pixels(batch, stored_size), theta, (stored_size, round(stored_size * width / height)))
        return {"aligned": aligned[:, 0].mul(255).round().clamp(0, 255).to(torch.uint8)}

    def search_space(self) -> dict[str, BaseDistribution]:
        def log_uniform(low: float, high: float) -> FloatDistribution:
            return FloatDistribution(low, high, log=True)

        features = self._searched_feature_networks()
        deepest = min(perceptual.DEEPEST[kind] for kind in features)
        space: dict[str, BaseDistribution] = {
            "lr": log_uniform(3e-4, 5e-3),
            "parameterization": CategoricalDistribution(list(PARAMETERS)),
            "iterations": IntDistribution(1, 4),
            "feature_network": CategoricalDistribution(features),
            "feature_layers": IntDistribution(1, deepest - self.first_feature_layer + 1),
            "pixel_weight": log_uniform(0.01, 1),
            "feature_weight": log_uniform(0.01, 3),
            "structure_weight": log_uniform(0.03, 3),
            "equivariance_weight": log_uniform(1, 30),
        }
        if not self.target_uri:
            space["target"] = CategoricalDistribution(list(get_args(TargetStrategy)))
        if not self.backbone_pretrained:
            space["backbone"] = CategoricalDistribution(["conv3", "conv4", "conv5", "conv6"])
        return space | ({"overlap_weight": log_uniform(1, 30)} if self.lungs else {})

    def _searched_feature_networks(self) -> list[FeatureKind]:
        """local, and the given network or, if there is none, the encoder of the shipped lung network."""
        if self.feature_network != "local":
            return ["local", self.feature_network]
        return ["local", "lungs"] if self.feature_pretrained == pretrained.AUTO else ["local"]

    def make_optimizer(self, task: Task, stage: Stage, *, fused: bool) -> Optimizer:
        return AdamWWithCosine(self).make_optimizer(task, stage, fused=fused)

    def make_schedule(self, optimizer: Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        if self.decay == "linear":
            return optimizers.linear(optimizer, stage.epochs * updates_per_epoch)
        return AdamWWithCosine(self).make_schedule(optimizer, stage, updates_per_epoch)

    def degenerate_reason(self, metrics: Mapping[str, float]) -> str:
        return alignment.degenerate(metrics["mean_scale"], metrics["mean_translation_pct"] / 100, metrics["mirrored"])

    @property
    def is_pretrained(self) -> bool:
        return self.lung_pretrained != TRAIN

    def pretrain_shared(self, out: str) -> Self:
        """Train the lung network into OUT/lungs, if lung_pretrained=train."""
        if self.is_pretrained:
            return self
        training = LungTraining((min(self.size, LARGEST_PX),), self.lung_phantoms, self.lung_steps, self.seed)
        return self.replace(lung_pretrained=lung_pretraining.pretrain(training, storage.join(out, "lungs")))

    def initial_weights(self) -> dict[str, str]:
        backbone = {"backbone_pretrained": self.torchvision_backbone} if self.torchvision_backbone else {}
        lungs = {"lung_pretrained": ""} if pretrained.is_uri(self.lung_pretrained) else {}
        return backbone | lungs | self._feature_weights()

    def _feature_weights(self) -> dict[str, str]:
        """The initial weights of the perceptual loss, which are needed in every epoch."""
        if self.feature_network == "lungs":
            return {"feature_pretrained": ""} if self.feature_pretrained != pretrained.AUTO else {}
        return {} if self.feature_network == "local" else {"feature_pretrained": self.feature_network}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        if setting == "backbone_pretrained":
            blocks = make_backbone(self.backbone, channels=1 + self.lungs).blocks
            return pretrained.match(blocks.state_dict(), weights.state, self.backbone)
        if setting == "lung_pretrained":
            return lung_pretraining.match_weights(weights.state)
        return perceptual.needed(self.feature_network, weights.state)

    def without_weights(self, setting: str) -> Self | None:
        if setting != "feature_pretrained":
            return super().without_weights(setting)
        deepest = perceptual.DEEPEST["local"]
        first = min(self.first_feature_layer, deepest)
        layers = min(self.last_feature_layer, deepest) - first + 1
        return self.replace(feature_network="local", first_feature_layer=first, feature_layers=layers)

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        recipe, notes = super().resolve_weights(out)
        return recipe._with_feature_sha256(), notes

    def resume_from(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        """See `Recipe.resume_from`. The perceptual loss needs its weights again, and they must be the same."""
        current, notes = pretrained.resolve(self, self._feature_weights(), out)
        current = current._with_feature_sha256()
        recipe, more = super(AlignRecipe, current).resume_from(begun, out)
        return recipe.replace(feature_pretrained=current.feature_pretrained), notes + more

    def _with_feature_sha256(self) -> Self:
        stored = bool(self._feature_weights())
        return self.replace(feature_sha256=pretrained.sha256_of(self.feature_pretrained) if stored else "")


class AlignTask(Task):
    """An aligner, its target, and a frozen feature network that compares images with the target.

    All images that are compared are contrast-normalized, so that 0, the value outside the image, is neutral.
    """

    network: SpatialTransformer
    target: Tensor
    lung_target: Tensor
    _aligned_sum: Tensor  # of the images of the current epoch and their lung fields, aligned, (2, size, size)
    _theta_sum: Tensor
    _count: Tensor

    def __init__(self, recipe: AlignRecipe, network: nn.Module) -> None:
        super().__init__()
        assert isinstance(network, SpatialTransformer)
        self.recipe = recipe
        self.network = network  # pyright: ignore[reportIncompatibleVariableOverride]
        kind = recipe.feature_network if recipe.feature_weight else "local"  # its features are not compared
        layers = (recipe.last_feature_layer, recipe.first_feature_layer) if recipe.feature_weight else (1, 1)
        self.features = feature_network(kind, recipe.feature_pretrained, *layers)
        shape = recipe.output_shape
        saved = read_target(recipe.target_uri) if recipe.target_uri else torch.zeros(shape)
        target = F.interpolate(saved.float()[None, None], shape, mode="bilinear", antialias=True)
        self.register_buffer("target", target)
        self.register_buffer("lung_target", torch.zeros_like(target))
        self.feature_targets: tuple[str, ...] = ()  # names of buffers, shallow to deep
        if self.strategy == "features":
            self._register_feature_targets([torch.zeros_like(values) for values in self.features(target)])
        sums = torch.zeros(2, *shape, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
        self.register_buffer("_aligned_sum", sums[0], persistent=False)
        self.register_buffer("_theta_sum", sums[1], persistent=False)
        self.register_buffer("_count", torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def strategy(self) -> TargetStrategy | Literal["saved"]:
        return "saved" if self.recipe.target_uri else self.recipe.target

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Load the pretrained networks, and compute the target from the training images.

        Raises:
            UserError: the lung network has not been trained yet: call `AlignRecipe.pretrain_shared` first.
        """
        recipe = self.recipe
        if recipe.backbone_pretrained:
            weights = pretrained.from_uri(recipe.backbone_pretrained)
            pretrained.load(self.network.backbone.get_submodule("blocks"), weights, recipe.backbone)
        if self.network.lungs is not None:
            self.network.lungs.load_state_dict(lung_pretraining.load_weights(recipe.lung_pretrained))
        if self.strategy == "saved":
            self.lung_target = self._lung_fields(self.target)
            return
        lung_field = None
        if self.strategy == "lung_crops":
            lung_field = lung_pretraining.load_network(recipe.lung_pretrained).to(self.target.device)
        image, lungs, features = Mean(), Mean(), [Mean() for _ in self.feature_targets]
        with torch.no_grad():
            for batch in batches():
                x = unit_pixels(batch, recipe.size)
                theta = lung_crops(lung_field, x) if lung_field else identity(1, x.device)
                z = normalize_contrast(x)
                z, z_lungs = warp(torch.cat([z, self._lung_fields(z)], 1), theta, recipe.output_shape).split(1, 1)
                image.add(z)
                lungs.add(z_lungs)
                for meter, values in zip(features, self.features(z) if features else (), strict=True):
                    meter.add(values)
        self.target = normalize_contrast(image.over(workers, self.target[0])[None].float())
        self.lung_target = lungs.over(workers, self.target[0])[None].float()
        templates = [self.get_buffer(name)[0] for name in self.feature_targets]
        self._register_feature_targets(
            [meter.over(workers, template)[None].float() for meter, template in zip(features, templates, strict=True)]
        )

    @torch.no_grad()
    def _lung_fields(self, z_B1HW: Tensor) -> Tensor:
        """Lung fields (B, 1, H, W) in contrast-normalized images; zeros without a lung network."""
        return torch.zeros_like(z_B1HW) if self.network.lungs is None else self.network.lungs(z_B1HW)

    def augmented(self, batch: Batch) -> Batch:
        """V random warps of each image, each with another exposure; V is 2 if they are compared, otherwise 1.

        pixels: (B, size, size), unchanged except for their size. warps: (VB, 2, 3), first one of every image, then
        the other. warped: the network's input, (VB, 1, size, size).
        """
        x = unit_pixels(batch, self.recipe.size)
        x_repeated = x.repeat(1 + bool(self.recipe.equivariance_weight), 1, 1, 1)
        warps = self._random_warps(len(x_repeated), x.device)
        warped = random_exposure(warp(x_repeated, warps), gamma=self.recipe.gamma, noise=self.recipe.noise)
        return batch | {schema.PIXELS: x[:, 0], WARPS: warps, WARPED: warped}

    def _random_warps(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        return random_affine(
            count,
            rotation_deg=self.recipe.rotation_deg,
            max_zoom=self.recipe.max_zoom,
            translate=self.recipe.translate,
            device=device,
            generator=generator,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Align random warps of each image, and compare the results with the target and with each other."""
        recipe, terms = self.recipe, dict[str, Tensor]()
        z = normalize_contrast(unit_pixels(batch, recipe.size))
        z_and_lungs = torch.cat([z, self._lung_fields(z)], 1).repeat(len(batch[WARPS]) // len(z), 1, 1, 1)
        theta = compose(batch[WARPS], self.network(batch[WARPED]))  # applies to the images as stored
        aligned_and_lungs = warp(z_and_lungs, theta, recipe.output_shape)
        if self.strategy == "structure":
            self._aligned_sum = self._aligned_sum + aligned_and_lungs.detach().double().sum(0)
            self._theta_sum = self._theta_sum + theta.detach().double().sum(0)
            self._count = self._count + len(theta)
        aligned, lungs = aligned_and_lungs.split(1, 1)

        if recipe.lungs and recipe.overlap_weight:
            terms["overlap"] = recipe.overlap_weight * (1 - soft_dice(lungs, self.lung_target)).mean()
        if recipe.pixel_weight:
            terms["pixel"] = recipe.pixel_weight * (aligned - self.target).square().mean()
        if recipe.feature_weight:
            distance = feature_distance(self.features(aligned), self._target_features())
            terms["feature"] = recipe.feature_weight * distance
        if recipe.structure_weight:
            sides = [int(recipe.size * fraction) // 2 * 2 + 1 for fraction in NEIGHBORHOODS]
            correlations = [alignment.local_correlation(aligned, self.target, side).mean() for side in sides]
            terms["structure"] = recipe.structure_weight * (1 - torch.stack(correlations).mean())
        if recipe.equivariance_weight:
            terms["equivariance"] = recipe.equivariance_weight * frame_distance(*theta.chunk(2)).mean()
        if recipe.identity_weight:
            # Over the images of all workers, because the distance of a mean is not the mean of distances.
            mean_theta = self.workers.all_rows(theta).mean(0, True)
            terms["identity"] = recipe.identity_weight * corner_distance(mean_theta, identity(1, theta.device)).mean()
        return terms

    def end_epoch(self, workers: Communicator) -> None:
        """With target=structure, the mean of the images aligned in this epoch becomes the next target.

        The mean transform is removed, or else the common frame would drift. The contrast is restored, or else the
        target would fade.
        """
        if self.strategy != "structure":
            return
        sums = (self._aligned_sum, self._theta_sum, self._count)
        aligned, theta, count = (workers.sum(values) for values in sums)
        mean, drift = (aligned / count)[None].float(), (theta / count)[None].float()
        image, self.lung_target = warp(mean, invert(drift)).split(1, 1)
        self.target = normalize_contrast(image)
        self._aligned_sum, self._theta_sum, self._count = map(torch.zeros_like, sums)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `metrics.alignment`, all after removing the group's mean transform. Distances: % of the width.

        Always: group_correlation and pixel_std; equivariance_error_pct, the distance between the alignments of an
        image and of a random warp of it; mean_scale, mean_translation_pct and mirrored, for `alignment.degenerate`.
        With a lung network: pairwise_lung_iou, the mean IoU of pairs of its lung fields, aligned from random warps of
        the images. With lung masks: mask_iou, the mean IoU of pairs of masks. With known poses: corner_error_pct (the
        mean) and corner_error_median_pct. Names that end in _before are the same metrics without alignment.
        """
        device = self.target.device
        theta_mean, mirrored, equivariance_error, poses = Mean(), Mean(), Mean(), [torch.zeros(0, 12, device=device)]
        generator = torch.Generator().manual_seed(self.recipe.seed + workers.rank)
        for x, theta, batch in self._aligned(batches):
            theta_mean.add(theta)
            mirrored.add(alignment.mirrored(theta))
            warps = self._random_warps(len(x), device, generator)
            equivariance_error.add(frame_distance(compose(warps, self.network(warp(x, warps))), theta))
            poses.append(_with_known_pose(theta, batch))
        mean_theta = theta_mean.over(workers, identity(1, device)[0])[None].float()
        scalar = torch.zeros((), device=device)
        return {
            **self._overlap(batches, workers, mean_theta),
            "equivariance_error_pct": 100 * float(equivariance_error.over(workers, scalar)),
            **alignment.pose_metrics(workers.gather(torch.cat(poses))),
            "mean_scale": float(alignment.mean_scale(mean_theta)),
            "mean_translation_pct": 100 * float(alignment.middle_shift(mean_theta)),
            "mirrored": float(mirrored.over(workers, scalar)),
        }

    def _overlap(self, batches: Batches, workers: Communicator, mean_theta: Tensor) -> dict[str, float]:
        device, masks_kept = self.target.device, -(-COMPARED_MASKS // workers.size)
        before, after, predicted = (alignment.Overlap(self.recipe.size, device, masks_kept) for _ in range(3))
        generator = torch.Generator().manual_seed(self.recipe.seed + workers.rank)
        for x, theta, batch in self._aligned(batches):
            centered = alignment.centered(theta, mean_theta)
            for overlap, transform in ((before, identity(len(x), device)), (after, centered)):
                overlap.add(x, transform)
                if schema.MASKS in batch:
                    present = batch[schema.MASKS][:, 0, 0] != NO_MASK
                    overlap.add_masks(batch[schema.MASKS][present], transform[present])
            if self.network.lungs is not None and not predicted.full:
                lungs = self._lung_fields(normalize_contrast(x))[:, 0]
                for _ in range(WARPS_PER_IMAGE):
                    warps = self._random_warps(len(x), device, generator)
                    composed = compose(warps, self.network(warp(x, warps)))
                    predicted.add_masks(lungs, alignment.centered(composed, mean_theta))
        metrics: dict[str, float] = {}
        if self.network.lungs is not None:
            metrics["pairwise_lung_iou"] = predicted.iou(workers, of_empty=0.0)
        for ending, results in (("", after.results(workers)), ("_before", before.results(workers))):
            metrics |= {f"group_correlation{ending}": results["correlation"], f"pixel_std{ending}": results["spread"]}
            if "iou" in results:
                metrics[f"mask_iou{ending}"] = results["iou"]
        return metrics

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """before_after.png, mean_before_after.png, target.png, and target.pt, (H, W), for `target_uri`."""
        before, after, count = [], [], 0
        for x, theta, _ in self._aligned(batches):
            before.append(x[:, 0].cpu())
            after.append(warp(x, theta, self.recipe.output_shape)[:, 0].cpu())
            count += len(x)
            if count >= AVERAGED_IMAGES:
                break
        images, aligned = torch.cat(before).numpy(), torch.cat(after).numpy()
        target = self.target[0, 0].cpu()
        shown = image_ids[:SHOWN_IMAGES]
        rows = {"before": images[: len(shown)], "aligned": aligned[: len(shown)]}
        figures.save_figure(figures.picture_rows(rows, shown), str(folder), "before_after.png")
        means = {
            "mean before": images.mean(0),
            "mean aligned": aligned.mean(0),
            "target": as_unit(target).numpy(),
        }
        figures.save_figure(figures.pictures(means), str(folder), "mean_before_after.png")
        figures.save_gray(as_unit(target).numpy(), str(folder), "target.png")
        torch.save(target.clone(), folder / "target.pt")

    def _aligned(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor, Batch]]:
        """Each batch's images in [0, 1], their predicted transforms, and the batch."""
        for batch in batches():
            x = unit_pixels(batch, self.recipe.size)
            yield x, self.network(x), batch

    def _target_features(self) -> list[Tensor]:
        if self.feature_targets:
            return [self.get_buffer(name) for name in self.feature_targets]
        return self.features(self.target)

    def _register_feature_targets(self, features: list[Tensor]) -> None:
        self.feature_targets = tuple(f"feature_target_{i}" for i in range(len(features)))
        for name, values in zip(self.feature_targets, features, strict=True):
            self.register_buffer(name, values)


def _with_known_pose(theta: Tensor, batch: Batch) -> Tensor:
    """Rows (K, 12) of predicted and true transforms, of the K images whose pose is known."""
    if schema.TRUE_THETA not in batch:
        return theta.new_zeros(0, 12)
    pose = batch[schema.TRUE_THETA]
    return torch.cat([theta.flatten(1), pose], 1)[~pose.isnan().any(1)]
