"""Family `align`: brings frontal chest X-rays into one common frame, trained on the images alone."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pyarrow as pa
import torch
import tyro
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from torch import Tensor, nn

from cxr import schema, storage
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import lung_pretraining
from cxr.families.align_task import AlignTask, Augmentation, Strategy, TermWeights
from cxr.families.base import Recipe, one_of, unit_pixels
from cxr.metrics import alignment
from cxr.models import perceptual, pretrained
from cxr.models.backbones import TRUNKS, TrunkName, trunk
from cxr.models.perceptual import FeatureKind
from cxr.models.pretrained import Weights
from cxr.models.small_unet import LungField
from cxr.models.spatial_transformer import PARAMETERS, Parameterization, SpatialTransformer, warp


@dataclass(frozen=True, kw_only=True)
class AlignRecipe(Recipe):
    """Spatial transformer (Jaderberg et al. 2015) that sees the lungs, trained by likeness to a target.

    No label and no real mask is needed: what a lung is, a small U-Net has learnt from phantoms. The defaults
    take some minutes for 400 images on two CPU cores; docs/decisions/0003 says how they were found.
    """

    family: ClassVar[str] = "align"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.TRUE_THETA, schema.MASKS)
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "lung_weights", "feature_weights")
    score_columns: ClassVar[pa.Schema] = pa.schema([(schema.THETA, pa.list_(pa.float32(), 6))])
    depends_on: ClassVar[Mapping[str, str]] = {"feature_layers": "feature_weight"}

    size: int = 128
    epochs: int = 20
    batch_size: int = 16
    lr: float = 2e-3

    transform: Parameterization = "anisotropic"
    """similarity: 4 parameters; anisotropic: 5 (two scales); affine: 6 (shear too)."""
    trunk: TrunkName = "conv5"
    """Localization network: small nets of 3–6 blocks, or a ResNet without pretrained weights."""
    passes: int = 3
    """How often the network is applied, each time to what it has aligned so far."""
    target: Strategy = "structure"
    """mean: the mean image; features: the mean of features; structure: the mean of what is aligned so far."""
    target_uri: str = ""
    """A saved target.pt to align to, which then stays as it is; none if empty."""

    lungs: bool = True
    """Show the trunk, and the loss, where the lungs are; without, images are compared alone."""
    lung_weights: str = ""
    """Path or URI of the lung network's weights, or of an aligner that holds one. Empty: one is trained first."""
    lung_phantoms: int = 1000
    """Phantoms from which the lung network learns."""
    lung_steps: int = 500
    """Steps of 16 phantoms for which it learns."""

    features: FeatureKind = "local"
    """Network of the perceptual loss; local needs no weights, lungs is the encoder of an aligner's lung network."""
    feature_weights: str = pretrained.AUTO
    """Weights of `features`: a path or URI of a state dict or checkpoint, or a torchvision name (IMAGENET1K_V1); auto
    takes torchvision's where they can be fetched, and features=local where they cannot."""
    feature_sha256: Annotated[str, tyro.conf.Suppress] = ""
    """Of those weights; read from them."""
    feature_layers: int = 3
    """How many layers are compared, from the shallowest on."""

    overlap_weight: float = 10.0
    """Of 1 − Dice overlap of the lung fields with the target's."""
    pixel_weight: float = 0.0
    """Of the squared difference from the target, both contrast-normalized."""
    feature_weight: float = 0.0
    """Of the squared difference of features from the target's."""
    structure_weight: float = 0.3
    """Of 1 − local correlation with the target, at two scales."""
    equivariance_weight: float = 3.0
    """Of the distance between the frames found for two random warps of one image, share of the width."""
    identity_weight: float = 1.0
    """Of the distance of a batch's mean transform from the identity, which fixes the common frame."""

    rotation_deg: float = 15.0
    """Augmentation: largest rotation."""
    scale: float = 1.25
    """Augmentation: largest zoom, in and out."""
    shift: float = 0.1
    """Augmentation: largest shift, share of the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("transform", self.transform, tuple(PARAMETERS))
        one_of("trunk", self.trunk, TRUNKS)
        one_of("target", self.target, get_args(Strategy))
        one_of("features", self.features, perceptual.KINDS)
        if self.passes < 1:
            raise UserError(f"passes={self.passes}: wanted 1 or more")
        if not 1 <= self.feature_layers <= perceptual.DEEPEST[self.features]:
            deepest = perceptual.DEEPEST[self.features]
            raise UserError(f"feature_layers={self.feature_layers}: {self.features} has 1–{deepest}")
        if self.features == "lungs" and not pretrained.is_uri(self.feature_weights):
            raise UserError("features='lungs' needs feature_weights, the URI of an aligner's checkpoint")
        if self.features != "local" and not self.feature_weights:
            raise UserError(
                f"features={self.features} needs feature_weights: give a path, a URI or a torchvision name"
            )
        if min(self.lung_phantoms, self.lung_steps) < 1:
            raise UserError(f"lung_phantoms={self.lung_phantoms}, lung_steps={self.lung_steps}: wanted 1 or more")
        terms = vars(self._terms())
        if min(terms.values()) < 0 or not 0 < sum(terms.values()) < math.inf:
            raise UserError(f"weights {terms}: wanted none negative and at least one above 0")

    @property
    def monitor(self) -> str:
        return "agreement"

    def network(self, findings: Sequence[str]) -> SpatialTransformer:
        lungs = LungField() if self.lungs else None
        return SpatialTransformer(trunk(self.trunk, 1 + self.lungs), self.transform, self.passes, lungs)

    def task(self, network: nn.Module) -> AlignTask:
        return AlignTask(
            network,
            self._feature_network(),
            size=self.size,
            strategy=self.target,
            terms=self._terms(),
            augmentation=Augmentation(self.rotation_deg, self.scale, self.shift),
            target_HW=read_target(self.target_uri) if self.target_uri else None,
            lung_weights=self.lung_weights,
            seed=self.seed,
        )

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {schema.THETA: network(unit_pixels(batch, self.size)).reshape(-1, 6)}

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        theta = network(unit_pixels(batch, self.size))
        aligned = warp(unit_pixels(batch, batch[schema.PIXELS].shape[-1]), theta)
        return {"aligned": aligned[:, 0].mul(255).round().clamp(0, 255).to(torch.uint8)}

    def search_space(self) -> dict[str, BaseDistribution]:
        def weight(low: float, high: float) -> FloatDistribution:
            return FloatDistribution(low, high, log=True)

        space: dict[str, BaseDistribution] = {
            "lr": weight(3e-4, 5e-3),
            "trunk": CategoricalDistribution(["conv3", "conv4", "conv5", "conv6"]),
            "transform": CategoricalDistribution(list(PARAMETERS)),
            "feature_layers": IntDistribution(1, perceptual.DEEPEST[self.features]),
            "pixel_weight": weight(0.01, 1),
            "feature_weight": weight(0.01, 3),
            "structure_weight": weight(0.03, 3),
            "equivariance_weight": weight(1, 30),
        }
        if not self.target_uri:
            space["target"] = CategoricalDistribution(list(get_args(Strategy)))
        return space | ({"overlap_weight": weight(1, 30)} if self.lungs else {})

    def pretrain_shared(self, out: str) -> Self:
        if self.is_pretrained:
            return self
        lesson = lung_pretraining.Lesson(self.size, self.lung_phantoms, self.lung_steps, self.seed)
        return self.replace(lung_weights=lung_pretraining.kept(lesson, storage.join(out, "lungs")))

    @property
    def is_pretrained(self) -> bool:
        return not self.lungs or bool(self.lung_weights)

    def degenerate_reason(self, metrics: Mapping[str, float]) -> str:
        return alignment.degenerate(metrics["mean_scale"], metrics["drift_pct"] / 100, metrics["mirrored"])

    def initial_weights(self) -> dict[str, str]:
        lungs = {"lung_weights": ""} if self.lungs else {}
        return lungs | self._feature_weights()

    def _feature_weights(self) -> dict[str, str]:
        """The part of `initial_weights` that every epoch needs, for the perceptual loss."""
        if self.features == "local":
            return {}
        return {"feature_weights": "" if self.features == "lungs" else self.features}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        if setting == "lung_weights":
            return lung_pretraining.matched(given.state)
        return perceptual.needed(self.features, given.state)

    def without_weights(self, setting: str) -> Self | None:
        layers = min(self.feature_layers, perceptual.DEEPEST["local"])
        return self.replace(features="local", feature_layers=layers)

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        resolved, notes = super().resolve_weights(out)
        return resolved._with_sha256(), notes

    def resume_from(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        """See `Recipe.resume_from`; what the perceptual loss compares with is needed again, and must be the same."""
        compared, notes = pretrained.resolve(self, self._feature_weights(), out)
        compared = compared._with_sha256()
        same, more = super(AlignRecipe, compared).resume_from(begun, out)
        return same.replace(feature_weights=compared.feature_weights), notes + more

    def _with_sha256(self) -> Self:
        return self.replace(
            feature_sha256=pretrained.sha256_of(self.feature_weights) if self._feature_weights() else ""
        )

    def _terms(self) -> TermWeights:
        named = {field.name: getattr(self, f"{field.name}_weight") for field in dataclasses.fields(TermWeights)}
        return TermWeights(**(named if self.lungs else named | {"overlap": 0.0}))

    def _feature_network(self) -> nn.Module:
        if not self.feature_weight or self.features == "local":
            return perceptual.build("local", None, self.feature_layers if self.feature_weight else 1)
        return perceptual.build(self.features, pretrained.from_uri(self.feature_weights), self.feature_layers)


def read_target(uri: str) -> Tensor:
    """A target (H, W) that `AlignTask.save_pictures` wrote as target.pt.

    Raises:
        UserError: nothing there, or no picture.
    """
    target = torch.load(io.BytesIO(storage.read_bytes(uri)), weights_only=True, map_location="cpu")
    if not isinstance(target, Tensor) or target.ndim != 2:
        raise UserError(f"{uri} holds no target: wanted a tensor (height, width), as saved in target.pt")
    return target
