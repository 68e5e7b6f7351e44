"""Family `classify`: a multi-label classifier on any backbone of torchvision or timm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from cxr import schema
from cxr.augment.mixup import mixup
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import optimizers
from cxr.families.base import Batches, Communicator, Stage, Task, one_of, unit_pixels
from cxr.families.classifier_base import (
    ClassifierRecipe,
    ClassifierTask,
    count_labels,
    positive_class_weights,
)
from cxr.families.image_augmentation import ImageAugmentationRecipe
from cxr.families.partner_window import PARTNERS, USABLE, PartnerWindow
from cxr.models import pretrained
from cxr.models.classification_loss import asymmetric_loss
from cxr.models.image_backbone import SMALL, TIMM, check_backbone, check_backbone_name, image_backbone
from cxr.models.image_classifier import HEADS, HeadName, ImageClassifier
from cxr.models.input_contract import CONTRACTS, InputContract
from cxr.models.input_contract import named as named_contract
from cxr.models.multiscale_cam import cell_centers, resampled
from cxr.models.pretrained import Fit
from cxr.reporting import attention, figures

Loss = Literal["bce", "focal", "asymmetric"]
HEAD_STAGE = "head"  # the stage that trains only the head
MAP_STRIDE = 8  # pixels of the input per cell of a convolutional network's heat maps, if they divide its size
PICTURED = 8  # images in the picture of a run
SIZES: tuple[tuple[str, ...], ...] = (
    ("resnet18", "resnet34", "resnet50", "resnet101"),
    ("densenet121", "densenet169", "densenet201"),
    ("convnext_tiny", "convnext_small", "convnext_base"),
    ("efficientnet_b0", "efficientnet_b2", "efficientnet_b4"),
    (SMALL, "resnet18"),
)
"""Backbones of increasing depth or width, among which a search chooses."""


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(ClassifierRecipe, ImageAugmentationRecipe):
    """A multi-label classifier of whole images."""

    family: ClassVar[str] = "classify"

    size: int = 192
    epochs: int = 20
    batch_size: int = 16
    lr: float = 2e-3

    backbone: str = SMALL
    """Backbone. small: a ResNet with 250,000 parameters, for CPUs; timm:NAME: a network of timm; otherwise a network
    of torchvision, such as densenet121."""
    input: str = "imagenet"
    """Input that the backbone expects: the number of channels, their range, and the mean and standard deviation for
    normalization. imagenet, inception, dinov2, rad-dino, eva-x and clip (three channels), unit (one channel in
    [0, 1]), or torchxrayvision (one channel in [-1024, 1024]). rad-dino and torchxrayvision also crop images to a
    square."""
    head: HeadName = "linear"
    """Classifier on top of the backbone. linear: a linear layer on its pooled features; mlp: two layers on them;
    attention: a linear layer, with learned attention as pooling; mil: multiple-instance learning, in which an image
    shows a finding if any position does; lse: log-sum-exp of the positions' logits."""
    freeze_backbone: bool = False
    """Keep all weights of the backbone fixed in training."""
    freeze_layers: int = 0
    """Number of layers of the backbone, counted from the input, whose weights stay fixed in training. The stem and
    each block count as one layer."""
    head_epochs: int = 0
    """Number of epochs of a first stage that trains only the head. 0: no such stage."""

    loss: Loss = "bce"
    """Loss: bce (cross-entropy), focal (Lin et al. 2017), or asymmetric (Ridnik et al. 2021)."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss."""
    gamma_positive: float = 0.0
    """Exponent of positives in the asymmetric loss."""
    gamma_negative: float = 4.0
    """Exponent of negatives in the asymmetric loss."""
    margin: float = 0.05
    """Probability below which negatives do not contribute to the asymmetric loss."""
    pos_weight_power: float = 0.0
    """Exponent p of the weight (negatives / positives)^p of a finding's positives in the loss; negatives have weight
    1. 0: unweighted."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: factor from each layer of the backbone to the layer before it. 1: all layers
    have the same learning rate; that of the head is always --lr."""

    mixup: float = 0.0
    """Augmentation: parameter alpha of mixup (Zhang et al. 2018), which averages each image with another one, and
    their labels. A label that is unknown in either image is unknown in their average. 0: no mixup."""
    tta_flip: bool = False
    """Average the probabilities over the image and its mirror image in validation and scoring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backbone_name(self.backbone)
        one_of("input", self.input, tuple(CONTRACTS))
        one_of("head", self.head, HEADS)
        one_of("loss", self.loss, get_args(Loss))
        for name in ("freeze_layers", "head_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("focal_gamma", "gamma_positive", "gamma_negative", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.margin < 1:
            raise UserError(f"margin: expected a number from 0 up to, but not including, 1, got {self.margin}")
        if not 0 <= self.pos_weight_power <= 2:
            raise UserError(f"pos_weight_power: expected a number from 0 to 2, got {self.pos_weight_power}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay: expected a number above 0 and up to 1, got {self.layer_decay}")
        if self.keeps_weights and not self.backbone_pretrained:
            raise UserError(
                f"freeze_backbone or freeze_layers without backbone_pretrained: {self.backbone} would stay randomly "
                f"initialized. Set backbone_pretrained to a path, a URI or a torchvision name"
            )
        if self.freeze_backbone and self.head_epochs:
            raise UserError(
                "head_epochs: expected 0 with freeze_backbone, which trains only the head in every epoch, got "
                f"{self.head_epochs}"
            )

    @property
    def keeps_weights(self) -> bool:
        """Whether some weights of the backbone are never trained."""
        return self.freeze_backbone or self.freeze_layers > 0

    @property
    def input_contract(self) -> InputContract:
        return named_contract(self.input, self.size)

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        if not self.backbone_pretrained:  # a mistake must not first appear when an archive has been decoded
            image_backbone(self.backbone, self.input_contract.channels, self.size)
        return super().resolve_weights(out)

    def stages(self) -> tuple[Stage, ...]:
        head = (Stage(HEAD_STAGE, self.head_epochs, self.lr),) if self.head_epochs else ()
        return (*head, Stage("all" if head else "", self.epochs, self.lr))

    # ---- Network and weights

    def check_network(self) -> None:
        check_backbone(self.backbone)

    def network(self, findings: Sequence[str]) -> ImageClassifier:
        network = ImageClassifier(self.backbone, self.input_contract, findings, self.head)
        if self.freeze_layers:
            layers = 1 + max(network.backbone.layer_of().values())
            if self.freeze_layers >= layers:
                raise UserError(
                    f"freeze_layers: expected fewer than the {layers} layers of {self.backbone}, got "
                    f"{self.freeze_layers}; use freeze_backbone to train only the head"
                )
        return network

    def task(self, network: nn.Module) -> ClassifyTask:
        return ClassifyTask(self, network)

    @property
    def torchvision_backbone(self) -> str:
        return "" if self.backbone == SMALL or self.backbone.startswith(TIMM) else self.backbone

    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        return pretrained.load(_classifier(network).backbone.body, state, f"backbone {self.backbone}")

    def without_weights(self, setting: str) -> ClassifyRecipe | None:
        return None if self.keeps_weights else super().without_weights(setting)

    # ---- Scoring

    def probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        x_B1HW = unit_pixels(batch, self.size)
        p_BF = network(x_B1HW).float().sigmoid()
        return (p_BF + network(x_B1HW.flip(-1)).float().sigmoid()) / 2 if self.tta_flip else p_BF

    def embed(self, network: nn.Module, batch: Batch) -> Tensor:
        """(B, D) pooled features, float32; with `linear`, `mlp` and `attention`, the input of the head."""
        return _classifier(network).embed(unit_pixels(batch, self.size))

    def predict_and_embed(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        classifier, x_B1HW = _classifier(network), unit_pixels(batch, self.size)
        features = classifier.features(x_B1HW)
        p_BF = classifier.logits(features).sigmoid()
        if self.tta_flip:
            p_BF = (p_BF + network(x_B1HW.flip(-1)).float().sigmoid()) / 2
        return self.decide({schema.PROBABILITIES: p_BF}, network), classifier.pool(features).float()

    def heat_maps(self, network: nn.Module, batch: Batch) -> Tensor:
        """Positive evidence for each finding, (B, F, h, w) in [0, 1].

        The maximum of a map is the finding's probability, so that the map of an absent finding is dark.
        """
        classifier, size = _classifier(network), self.size
        with torch.no_grad(), torch.autocast(batch[schema.PIXELS].device.type, enabled=False):
            logits_BF, evidence_BFhw = classifier.evidence(unit_pixels(batch, size))
            field = classifier.backbone.receptive_field
            if field is not None:
                centers_N = cell_centers(size, math.gcd(size, MAP_STRIDE), evidence_BFhw.device)
                evidence_BFhw = resampled(evidence_BFhw, field, centers_N)
            evidence_BFhw = evidence_BFhw.clamp(min=0)
            peak_BF = evidence_BFhw.amax((2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
            p_BF = self.probabilities(network, batch) if self.tta_flip else logits_BF.sigmoid()
            return evidence_BFhw * (p_BF / peak_BF)[:, :, None, None]

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """heat: the heat map of the most probable finding over the image."""
        x = unit_pixels(batch, self.size)[:, 0].cpu().numpy()
        heat = self.heat_maps(network, batch).cpu().numpy()
        p = self.probabilities(network, batch).cpu().numpy()
        findings = _classifier(network).findings
        pictures = []
        for image_HW, heat_Fhw, p_F in zip(x, heat, p, strict=True):
            f = int(p_F.argmax())
            pictures.append(attention.titled(attention.heated(image_HW, heat_Fhw[f]), f"{findings[f]} {p_F[f]:.2f}"))
        return {"heat": torch.from_numpy(np.stack(pictures))}

    # ---- Optimization

    def loss_of(self, logits_BF: Tensor, labels_BF: Tensor, class_weight_2F: Tensor) -> Tensor:
        """The mean loss of known labels, a scalar.

        Args:
            labels_BF: probabilities of the findings, or `schema.UNKNOWN`.
            class_weight_2F: weights of negatives and positives.
        """
        exponents = {
            "bce": (0.0, 0.0, 0.0),
            "focal": (self.focal_gamma, self.focal_gamma, 0.0),
            "asymmetric": (self.gamma_positive, self.gamma_negative, self.margin),
        }
        gamma_positive, gamma_negative, margin = exponents[self.loss]
        loss_BF = asymmetric_loss(
            logits_BF,
            labels_BF.clamp(min=0),
            gamma_positive=gamma_positive,
            gamma_negative=gamma_negative,
            margin=margin,
            class_weight_2F=class_weight_2F,
        )
        # The divisor does not depend on which labels are known, so the mean over workers is that of the whole batch.
        return (loss_BF * (labels_BF != schema.UNKNOWN)).mean()

    loss_scale: ClassVar[float] = 1.0
    ema_ramp: ClassVar[float] = 0.0

    def make_optimizer(self, task: Task, stage: Stage, *, fused: bool) -> AdamW:
        groups = layer_decay_groups(_classifier(task.network), stage.lr, self.weight_decay, self.layer_decay)
        return AdamW(groups, lr=stage.lr, fused=fused)

    def make_schedule(self, optimizer: torch.optim.Optimizer, stage: Stage, updates_per_epoch: int) -> LRScheduler:
        return optimizers.warmup_cosine(optimizer, self.warmup, stage.epochs * updates_per_epoch)

    # ---- Search

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate, weight of positives, head, and the size of the backbone, unless its weights are given."""
        space: dict[str, BaseDistribution] = {
            "lr": FloatDistribution(self.lr / 10, self.lr * 3, log=True),
            "pos_weight_power": FloatDistribution(0, 1),
            "head": CategoricalDistribution(list(HEADS)),
        }
        if self.backbone_pretrained and not self.freeze_backbone:
            space["layer_decay"] = FloatDistribution(0.5, 1)
        if not self.backbone_pretrained:
            sizes = next((sizes for sizes in SIZES if self.backbone in sizes), ())
            if len(sizes) > 1:
                space["backbone"] = CategoricalDistribution(list(sizes))
        return space


class ClassifyTask(ClassifierTask):
    """A classifier in training."""

    recipe: ClassifyRecipe

    def __init__(self, recipe: ClassifyRecipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        self.window = PartnerWindow(max(PARTNERS, recipe.batch_size), _partner_columns)

    def begin(self, batches: Batches, workers: Communicator) -> None:
        super().begin(batches, workers)
        if self.recipe.pos_weight_power:
            counts_2F = count_labels(batches, workers, len(self.findings), self.class_weight.device)
            self.class_weight = positive_class_weights(counts_2F, self.recipe.pos_weight_power)

    def enter_stage(self, stage: str) -> None:
        backbone = _classifier(self.network).backbone
        all_fixed = self.recipe.freeze_backbone or stage == HEAD_STAGE
        layer_of = backbone.layer_of() if self.recipe.freeze_layers and not all_fixed else {}
        for name, parameter in backbone.body.named_parameters():
            parameter.requires_grad_(not all_fixed and layer_of.get(name, math.inf) >= self.recipe.freeze_layers)

    def train(self, mode: bool = True) -> ClassifyTask:
        """Modules with fixed weights stay in evaluation mode: statistics of norms do not move, and no block is
        dropped at random."""
        super().train(mode)
        for module in self.network.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def augmented(self, batch: Batch) -> Batch:
        x_B1HW, labels_BF = self._augmented_images(batch), batch[schema.LABELS]
        if self.recipe.mixup:
            self.window.show(batch)
            others = self.window.draw(len(x_B1HW))
            others_B1HW = self._augmented_images(others)
            x_B1HW, labels_BF = mixup(x_B1HW, labels_BF, others_B1HW, others[schema.LABELS], self.recipe.mixup)
        return batch | {schema.PIXELS: x_B1HW[:, 0], schema.LABELS: labels_BF}

    def _augmented_images(self, batch: Batch) -> Tensor:
        return self.recipe.augment_images(unit_pixels(batch, self.recipe.size))

    def look_ahead(self, batches: Iterator[Batch], skipped: int = 0) -> Iterator[Batch]:
        return self.window.look_ahead(batches, skipped) if self.recipe.mixup else batches

    def batches_before(self, rows: int) -> int:
        return self.window.batches_before(rows) if self.recipe.mixup else 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits_BF = self.network(unit_pixels(batch, self.recipe.size))
        return {self.recipe.loss: self.recipe.loss_of(logits_BF, batch[schema.LABELS], self.class_weight)}

    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """heat_maps.png: images, those with findings first, and the heat map of one finding of each.

        It is the most probable finding among those that the image is labeled with, or else among all.
        """
        batch = next(iter(batches()))
        without_B = (batch[schema.LABELS] != schema.POSITIVE).all(1)
        index = without_B.int().argsort(stable=True)[:PICTURED]
        batch = {name: values[index] for name, values in batch.items()}
        with torch.inference_mode():
            p_BF = self.recipe.probabilities(self.network, batch)
        heat = self.recipe.heat_maps(self.network, batch).cpu().numpy()
        positive_BF = batch[schema.LABELS] == schema.POSITIVE
        shown_B = torch.where(positive_BF.any(1, keepdim=True), (p_BF + 1) * positive_BF, p_BF).argmax(1).tolist()
        images = unit_pixels(batch, self.recipe.size)[:, 0].cpu().numpy()
        maps = [
            attention.heated(image, heat_Fhw[f]) / 255
            for image, heat_Fhw, f in zip(images, heat, shown_B, strict=True)
        ]
        present = [bool(row[f]) for row, f in zip(positive_BF.tolist(), shown_B, strict=True)]
        notes = [
            f"{self.findings[f]} {p_F[f]:.2f} ({'labeled' if there else 'no label'})"
            for f, p_F, there in zip(shown_B, p_BF.tolist(), present, strict=True)
        ]
        figure = figures.picture_rows(
            {"image": images, "heat map of the finding below": np.stack(maps)},
            [image_ids[int(i)] for i in index],
            notes=notes,
            scale=("evidence", attention.scale_strip()),
        )
        figures.save_figure(figure, str(folder), "heat_maps.png")


def layer_decay_groups(
    network: ImageClassifier, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Groups of trainable parameters for an optimizer; norms and biases have no weight decay.

    The learning rate of layer i of the backbone's n layers is lr · layer_decay^(n − i), with i from 0 at the input
    (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT). The head, whose learning rate is `lr`, comes first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    layer_of = network.backbone.layer_of() if layer_decay < 1 else {}
    layers = 1 + max(layer_of.values(), default=-1)
    in_body = {id(parameter): name for name, parameter in network.backbone.body.named_parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad:
            layer = layer_of.get(in_body.get(id(parameter), ""), layers)
            groups.setdefault((lr * layer_decay ** (layers - layer), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": group_lr, "weight_decay": weight_decay * decays}
        for (group_lr, decays), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _classifier(network: nn.Module) -> ImageClassifier:
    assert isinstance(network, ImageClassifier)
    return network


def _partner_columns(batch: Batch) -> dict[str, Tensor]:
    """What an image contributes to mixup: stored pixels and labels. It may be a partner if some label is known."""
    labels_BF = batch[schema.LABELS]
    known_B = (labels_BF != schema.UNKNOWN).any(1)
    return {schema.PIXELS: batch[schema.PIXELS], schema.LABELS: labels_BF, USABLE: known_B}
