"""Family `localize`: finds findings and where they are, taught by labels alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.boxes.from_heatmaps import FULL, BoxRule, ThresholdMode
from cxr.data.batch import Batch, to_arrow
from cxr.errors import UserError
from cxr.families import box_scores
from cxr.families.base import Recipe, ScoringContext, one_of, unit_pixels
from cxr.families.localize_task import Lesson, LocalizeTask, boxes_found, looked
from cxr.models import pretrained
from cxr.models.classifier import StemStride, load_body
from cxr.models.multiscale_cam import (
    CAM_BACKBONES,
    CamBackbone,
    MultiscaleCAM,
    Pooling,
    Relevance,
    StageChoice,
    Stages,
)
from cxr.models.pretrained import Weights
from cxr.reporting import attention

HEAT = "heat"  # what `predict` gives besides: maps (B, F, h, w), uint8


@dataclass(frozen=True, kw_only=True)
class LocalizeRecipe(Recipe):
    """Multiscale class activation maps (Sedai et al. 2018, arXiv 1808.08280).

    Theirs is backbone=densenet121 with pooling=mean and classifier_weights=IMAGENET1K_V1.
    """

    family: ClassVar[str] = "localize"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS, schema.BOXES)
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "classifier_weights")
    score_columns: ClassVar[pa.Schema] = pa.schema(
        [
            (schema.PROBABILITIES, pa.list_(pa.float32())),
            (schema.DECISIONS, pa.list_(pa.int8())),
            *schema.BOX_SCORES,
        ]
    )

    size: int = 192
    epochs: int = 20
    batch_size: int = 16
    lr: float = 2e-3

    backbone: CamBackbone = "small"
    """small: a ResNet of a quarter of a million parameters, for CPUs; else a network of torchvision."""
    stem_stride: StemStride = 4
    """By how much the backbone's first layers shrink the image: 4 (as published), 2 or 1. The stages' strides are 1,
    2, 4 and 8 times this."""
    cam_stages: StageChoice = "all"
    """Which of the backbone's four stages make maps: all, or the last alone (CAM, Zhou et al. 2016)."""
    relevance: Relevance = "learnt"
    """Weights of the stages, each finding's own: learnt, or the same of each stage."""
    pooling: Pooling = "lse"
    """What of a map tells a finding: its mean, its max, or log-sum-exp (lse), which lies between."""
    lse_r: float = 6.0
    """Sharpness of lse, the r of Pinheiro and Collobert 2015: near 0 it is the mean, above 10 nearly the max."""
    classifier_weights: str = ""
    """Weights that the backbone starts from: a path or URI of a state dict or checkpoint, or a torchvision name
    (IMAGENET1K_V1); auto takes torchvision's where they can be fetched. Empty: random weights."""
    balance: float = 1.0
    """How much rare findings' positives weigh: classes are weighed by (images / images of the class) to this power;
    1 as published (beta_P, beta_N), 0 for not at all."""

    map_stride: int = 4
    """Pixels of the network's input to a cell of the maps from which boxes are made."""
    hot: ThresholdMode = "share"
    """Which cells a box is put around: those that reach a share of their map's maximum, Otsu's threshold (otsu), or
    each of two fixed ones, 60 and 180 of 255 (wang, as in Wang et al. 2017)."""
    hot_share: float = 0.5
    """The share of the maximum, for `hot` share."""
    coldest: float = 0.1
    """A map whose maximum, in [0, 1], stays below has no box."""
    most_boxes: int = 3
    """Boxes of a finding in an image at most."""

    flip: float = 0.5
    """Augmentation: share of images that are mirrored."""
    rotation_deg: float = 5.0
    """Augmentation: largest rotation."""
    scale: float = 1.1
    """Augmentation: largest enlargement, and reduction, of either axis."""
    shift: float = 0.05
    """Augmentation: largest shift, as a share of the width."""
    exposure: float = 0.5
    """Augmentation: how much exposure and noise vary; 1: gamma up to 1.5, contrast by 30 %, brightness by .1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("backbone", self.backbone, CAM_BACKBONES)
        one_of("stem_stride", self.stem_stride, get_args(StemStride))
        one_of("cam_stages", self.cam_stages, get_args(StageChoice))
        one_of("relevance", self.relevance, get_args(Relevance))
        one_of("pooling", self.pooling, get_args(Pooling))
        if not 0 < self.lse_r < math.inf or not 0 <= self.balance <= 2:
            raise UserError(f"lse_r={self.lse_r}, balance={self.balance}: wanted lse_r above 0, balance from 0 to 2")
        if self.map_stride < 1 or self.size % self.map_stride:
            raise UserError(f"map_stride={self.map_stride}: wanted a divisor of size={self.size}")
        self._check_augmentation()
        try:
            _ = self._rule
        except ValueError as error:
            raise UserError(str(error)) from error

    def _check_augmentation(self) -> None:
        shares = {name: getattr(self, name) for name in ("flip", "shift", "exposure")}
        wrong = [f"{name}={value}" for name, value in shares.items() if not 0 <= value <= 1]
        if wrong or not 1 <= self.scale < math.inf or not 0 <= self.rotation_deg <= 180:
            given = [*wrong, f"scale={self.scale}", f"rotation_deg={self.rotation_deg}"]
            raise UserError(
                f"{', '.join(given)}: wanted shares from 0 to 1, a scale of 1 or more, and a rotation from 0 to 180"
            )

    @property
    def _rule(self) -> BoxRule:
        return BoxRule(self.hot, self.hot_share, self.coldest, self.most_boxes)

    @property
    def monitor(self) -> str:
        return "mean_auroc"

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        return {"mean_auroc": "max", "mean_ap": "max"}

    def network(self, findings: Sequence[str]) -> MultiscaleCAM:
        if not findings:
            raise UserError("the archive names no findings, and a classifier learns from labels: give one that does")
        return MultiscaleCAM(
            self.backbone,
            findings,
            self.stem_stride,
            stages=self.cam_stages,
            relevance=self.relevance,
            pooling=self.pooling,
            lse_r=self.lse_r,
        )

    def task(self, network: nn.Module) -> LocalizeTask:
        own = {field.name for field in dataclasses.fields(self)}
        taken = {field.name: getattr(self, field.name) for field in dataclasses.fields(Lesson) if field.name in own}
        return LocalizeTask(network, Lesson(rule=self._rule, **taken), self._start)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, MultiscaleCAM)
        _, heat, p = looked(network, unit_pixels(batch, self.size), self.map_stride)
        return {
            schema.PROBABILITIES: p,
            schema.DECISIONS: (p >= network.thresholds).to(torch.int8),
            HEAT: heat,
        }

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        told = zip(predicted[HEAT].cpu().numpy(), predicted[schema.PROBABILITIES].float().cpu().numpy(), strict=True)
        found = [boxes_found(heat, p, self._rule) for heat, p in told]
        columns = [
            to_arrow(predicted[name], self.score_columns.field(name).type)
            for name in (schema.PROBABILITIES, schema.DECISIONS)
        ]
        return pa.table([*columns, box_scores.to_box_column(found, rows, context)], schema=self.score_columns)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """overlay: the most probable finding's map and boxes. stages: the image, each stage's map, all together."""
        assert isinstance(network, MultiscaleCAM)
        x = unit_pixels(batch, self.size)
        maps, heat, p = looked(network, x, self.map_stride)
        own = network.placed_maps(maps, self.size, self.map_stride)
        drawn = [
            self._drawn(network, *one)
            for one in zip(*(values.float().cpu().numpy() for values in (x[:, 0], own, heat, p)), strict=True)
        ]
        overlays, stages = zip(*drawn, strict=True)
        return {"overlay": _stacked(overlays), "stages": _stacked(stages)}

    def _drawn(
        self,
        network: MultiscaleCAM,
        picture_HW: np.ndarray,
        own_SFhw: np.ndarray,
        heat_Fhw: np.ndarray,
        p_F: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The two pictures of an image, blue, green, red."""
        f = int(p_F.argmax())
        found = boxes_found(heat_Fhw[f : f + 1].astype(np.uint8), p_F[f : f + 1], self._rule)
        warm = attention.heated(picture_HW, heat_Fhw[f] / FULL)
        overlay = attention.titled(attention.boxed(warm, found.boxes_N4), f"{network.findings[f]} {p_F[f]:.2f}")
        weights = network.relevance()[:, f].tolist()
        titles = [f"stride {r.stride}: {w:.2f}" for r, w in zip(network.reaches, weights, strict=True)]
        stages = [
            attention.titled(attention.heated(picture_HW, own[f]), t) for own, t in zip(own_SFhw, titles, strict=True)
        ]
        plain = attention.heated(picture_HW, np.zeros((1, 1)))
        return overlay, np.hstack([plain, *stages, warm])

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate and pooling."""
        return {
            "lr": FloatDistribution(2e-4, 5e-3, log=True),
            "pooling": CategoricalDistribution(list(get_args(Pooling))),
        }

    def initial_weights(self) -> dict[str, str]:
        return {"classifier_weights": "" if self.backbone == "small" else self.backbone}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        load_body(Stages(self.backbone, self.stem_stride), given.state)
        return given.state

    def _start(self, network: MultiscaleCAM) -> None:
        if self.classifier_weights:
            load_body(network.trunk, pretrained.from_uri(self.classifier_weights))


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))
