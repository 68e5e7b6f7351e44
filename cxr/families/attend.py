"""Family `attend`: finds where findings lie by comparing aligned X-rays with those of people without any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import pyarrow as pa
import torch
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn

from cxr import schema, storage
from cxr.boxes.from_heatmaps import BoxRule
from cxr.data.batch import Batch, to_arrow
from cxr.errors import UserError
from cxr.families import box_scores
from cxr.families.align import AlignRecipe
from cxr.families.attend_task import AttendTask, Lesson, boxes_found, framed, in_frame, strongest
from cxr.families.base import Recipe, ScoringContext, one_of, unit_pixels
from cxr.models import pretrained
from cxr.models.contrast_attention import (
    BACKBONES,
    Backbone,
    ContrastAttention,
    Stages,
    load_backbone,
    probabilities,
)
from cxr.models.mil_loss import MILLoss
from cxr.models.pretrained import Weights
from cxr.models.spatial_transformer import SpatialTransformer, identity, warp
from cxr.models.state_dicts import matching

LOGITS = "logits"  # what `scored` makes boxes of
SHA256 = "sha256"  # of the aligner's weights: another aligner gives another network


@dataclass(frozen=True, kw_only=True)
class AttendRecipe(Recipe):
    """Align, attend and locate (CIA-Net, Liu et al., ICCV 2019), which was published without its code.

    An aligner brings every image into one frame, each is compared with one without findings, and a grid of cells
    learns from labels, and from boxes where there are some, in which cells findings lie. The paper's settings are
    size=512 and backbone=resnet50 with all four stages and torchvision's weights; see `box_weight`.

    In training an image is compared with another of the same step; in use, where no label may be known, with the mean
    of the features of training images without findings, which is kept in the checkpoint, as is the aligner.

    ChestX-ray14 has its boxes in the test split alone, and folds deal the patients of train and val: to train with
    boxes as Li et al. (2018) and Liu et al. (2019) did, in five folds, list all images of `BBox_List_2017.csv`, and
    all others of their patients, in `train_val_list.txt` in place of `test_list.txt`, and give folds=5.
    """

    family: ClassVar[str] = "attend"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS, schema.BOXES, schema.IMAGE_ID)
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "aligner", "backbone_weights")
    depends_on: ClassVar[Mapping[str, str]] = {"box_weight": "box_share"}
    score_columns: ClassVar[pa.Schema] = pa.schema(
        [
            (schema.PROBABILITIES, pa.list_(pa.float32())),
            (schema.DECISIONS, pa.list_(pa.int8())),
            *schema.BOX_SCORES,
        ]
    )

    size: int = 128
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    epochs: int = 12
    batch_size: int = 16
    lr: float = 5e-4

    aligner: str = ""
    """URI of a checkpoint of family `align`, by which images are aligned first; empty: as they are."""
    aligner_recipe: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """What that checkpoint says of itself; read from it."""
    backbone: Backbone = "resnet18"
    """ResNet of torchvision whose features are compared."""
    backbone_weights: str = ""
    """Weights that the backbone starts from: a path or URI of a state dict or checkpoint, or a torchvision name
    (IMAGENET1K_V1); auto takes torchvision's where they can be fetched. Empty: random weights."""
    backbone_stages: Stages = 3
    """Of the backbone: 4, as published, shrink an image by 32, the first 3 by 16."""
    grid: int = 0
    """Cells to a side of the grid in which findings are located; 0: as the backbone gives, 16 for the published."""

    positives: float | None = 0.5
    """Share of the images of an epoch that show any finding; None: images as they are."""
    box_weight: float = 1.0
    """Of a finding with a box in the loss, beside one with a label only: more locates better, less classifies better.
    The paper's 5 is of factors moved into [.98, 1], where a cell counts .02 as much: of these here it is .1."""
    box_share: float = 1.0
    """Share of the training images with boxes whose boxes are used, chosen by a hash of the image's name; of the
    others only the labels are."""

    rotation_deg: float = 5.0
    """Augmentation: largest rotation, of the aligned image."""
    scale: float = 1.1
    """Augmentation: largest zoom, in and out."""
    shift: float = 0.03
    """Augmentation: largest shift, share of the width."""

    box_least: float = 0.05
    """Probability below which a finding gets no box."""
    box_cut: float = 0.5
    """Share of a map's maximum from which cells belong to a box."""
    box_most: int = 3
    """Boxes of a finding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("backbone", self.backbone, BACKBONES)
        one_of("backbone_stages", self.backbone_stages, (3, 4))
        if self.grid < 0 or self._grid < 1:
            raise UserError(f"grid={self.grid}, size={self.size}: wanted 0, or 1 cell or more")
        for name in ("box_share", "box_least", *(("positives",) if self.positives is not None else ())):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: wanted a share from 0 to 1")
        if self.positives == 0:
            raise UserError("positives=0: an epoch without findings teaches nothing. Wanted a share above 0, or None")
        if self.rotation_deg < 0 or self.scale < 1 or self.shift < 0:
            raise UserError(
                f"rotation_deg={self.rotation_deg}, scale={self.scale}, shift={self.shift}: wanted none negative, "
                f"and a scale of 1 or more"
            )
        try:
            _ = self._loss, self._rule
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def _loss(self) -> MILLoss:
        return MILLoss(self.box_weight)

    @property
    def _rule(self) -> BoxRule:
        return BoxRule(threshold=self.box_cut, max_boxes=self.box_most)

    @property
    def _grid(self) -> int:
        return self.grid or -(-self.size // (32 if self.backbone_stages == 4 else 16))

    @property
    def _aligner_size(self) -> int:
        return int(self.aligner_recipe.get("size", self.size))

    @property
    def monitor(self) -> str:
        return "mean_auroc"

    def positive_fraction(self, epoch: int) -> float | None:
        return self.positives

    @property
    def sampled_finding(self) -> str:
        return schema.ANY_FINDING

    def network(self, findings: Sequence[str]) -> ContrastAttention:
        if not findings:
            raise UserError("the archive names no findings, and locating learns from labels: give one that does")
        return ContrastAttention(self.backbone, findings, self._grid, self.backbone_stages, self._aligner())

    def _aligner(self) -> SpatialTransformer | None:
        """A new aligner, without its weights."""
        assert bool(self.aligner) == bool(self.aligner_recipe), (
            "`resolve_weights` reads what the aligner's checkpoint says of itself"
        )
        settings = {name: value for name, value in self.aligner_recipe.items() if name != SHA256}
        return AlignRecipe.from_dict(settings).network(()) if self.aligner else None

    def task(self, network: nn.Module) -> AttendTask:
        own = {one.name for one in dataclasses.fields(self)}
        taken = {one.name: getattr(self, one.name) for one in dataclasses.fields(Lesson) if one.name in own}
        lesson = Lesson(**taken, loss=self._loss, rule=self._rule, aligner_size=self._aligner_size)
        return AttendTask(network, lesson, self._start)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Probabilities, decisions, and what `scored` makes boxes of: logits of cells, transforms to the images."""
        assert isinstance(network, ContrastAttention)
        x, theta = self._aligned(network, batch)
        logits = network(x).float()
        p = probabilities(logits)
        return {
            schema.PROBABILITIES: p,
            schema.DECISIONS: (p >= network.thresholds).to(torch.int8),
            schema.THETA: theta,
            LOGITS: logits,
        }

    def _aligned(self, network: ContrastAttention, batch: Batch) -> tuple[Tensor, Tensor]:
        x, theta = in_frame(network, batch, self.size, self._aligner_size)
        return (x, identity(len(x), x.device)) if theta is None else (warp(x, theta), theta)

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        found = boxes_found(predicted[LOGITS], predicted[schema.THETA], self._rule, self.box_least)
        columns = [
            to_arrow(predicted[name], self.score_columns.field(name).type)
            for name in (schema.PROBABILITIES, schema.DECISIONS)
        ]
        return pa.table([*columns, box_scores.to_box_column(found, rows, context)], schema=self.score_columns)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """located: the image as given and aligned, each with the boxes of the finding that was found best."""
        assert isinstance(network, ContrastAttention)
        x, theta = self._aligned(network, batch)
        logits, most = network(x), self.box_most
        pairs = ((unit_pixels(batch, self.size), theta), (x, identity(len(x))))
        sides = [
            framed(shown, strongest(boxes_found(logits, way, self._rule), most).to(shown.device))
            for shown, way in pairs
        ]
        return {"located": torch.cat(sides, 2).mul(255).round().clamp(0, 255).to(torch.uint8)}

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate, weight of boxes, and the backbone where no weights are given for one."""
        space: dict[str, BaseDistribution] = {
            "lr": FloatDistribution(1e-4, 2e-3, log=True),
            "box_weight": FloatDistribution(0.01, 10, log=True),
        }
        return space if self.backbone_weights else space | {"backbone_stages": CategoricalDistribution([3, 4])}

    def initial_weights(self) -> dict[str, str]:
        return {"aligner": "", "backbone_weights": self.backbone}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        if setting == "aligner":
            return self._fit_aligner(given)
        load_backbone(ContrastAttention(self.backbone, (), 1, self.backbone_stages), given.state)
        return given.state

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        resolved, notes = super().resolve_weights(out)
        return resolved._with_aligner_recipe(), notes

    def resume_from(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        same = bool(self.aligner) and pretrained.key(self.aligner) == storage.name(begun["aligner"] or "none")
        known = self.replace(aligner_recipe=begun["aligner_recipe"]) if same else self
        return super(AttendRecipe, known).resume_from(begun, out)

    def _with_aligner_recipe(self) -> Self:
        """This recipe with what its aligner's checkpoint says of itself."""
        about = pretrained.about_of(self.aligner) if self.aligner else None
        return self.replace(aligner_recipe=about["recipe"] | {SHA256: about["sha256"]} if about else {})

    def _fit_aligner(self, given: Weights) -> Mapping[str, Tensor]:
        """The weights of an aligner.

        Raises:
            ValueError: they are not those of an aligner, or of one that cannot be used on these images.
        """
        recipe = given.about["recipe"] if given.about else {}
        if recipe.get("family") != AlignRecipe.family:
            raise ValueError(
                f"expected a checkpoint folder of family {AlignRecipe.family!r}, as jobs/train_align.py writes it"
            )
        if recipe["size"] > self.size:
            raise ValueError(f"it sees images of {recipe['size']} px, and size is {self.size}: raise size")
        self._check_same_images(recipe)
        return matching(
            AlignRecipe.from_dict(recipe).network(()).state_dict(), given.state, "the aligner", whole=True
        )

    def _check_same_images(self, aligner: Mapping[str, Any]) -> None:
        """Raise ValueError where the aligner has learnt from images that were made in another way."""
        for name in ("lung_crop", "denoise", "normalize", "equalize"):
            theirs, ours = aligner.get(name) or "none", getattr(self, name) or "none"
            same = (theirs == "none") == (ours == "none") if name == "lung_crop" else theirs == ours
            if not same:
                raise ValueError(
                    f"it was trained with {name}={theirs}, and {name} is {ours} here: give both the same value"
                )

    def _start(self, network: ContrastAttention) -> None:
        """Load what training begins with."""
        if self.backbone_weights:
            load_backbone(network, pretrained.from_uri(self.backbone_weights))
        if network.aligner is not None:
            network.aligner.load_state_dict(pretrained.from_uri(self.aligner))
