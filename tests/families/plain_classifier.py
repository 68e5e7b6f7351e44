"""A complete family on `classifier_base`: a torchvision network that classifies whole images. An example, not
shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cxr import schema
from cxr.augment.crops import random_flips
from cxr.data.batch import Batch
from cxr.families.base import unit_pixels
from cxr.families.classifier_base import ClassifierRecipe, ClassifierTask
from cxr.models.classifier import Classifier, ClassifierName, load_body
from cxr.models.pretrained import Fit


class PlainNetwork(Classifier):
    """Images (B, 1, H, W) in [0, 1] to logits (B, F)."""

    def __init__(self, backbone: ClassifierName, findings: Sequence[str]) -> None:
        super().__init__(backbone, len(findings))
        self.findings = tuple(findings)
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5))


@dataclass(frozen=True, kw_only=True)
class PlainRecipe(ClassifierRecipe):
    """A torchvision network on whole images."""

    family: ClassVar[str] = "plain"

    backbone: ClassifierName = "resnet18"
    """torchvision network."""
    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""

    @property
    def torchvision_backbone(self) -> str:
        return self.backbone

    def network(self, findings: Sequence[str]) -> PlainNetwork:
        return PlainNetwork(self.backbone, findings)

    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        return load_body(network, state)

    def task(self, network: nn.Module) -> PlainTask:
        return PlainTask(self, network)


class PlainTask(ClassifierTask):
    """Trains the network with random flips."""

    recipe: PlainRecipe

    def augmented(self, batch: Batch) -> Batch:
        x_B1HW = random_flips(unit_pixels(batch, self.recipe.size), self.recipe.flip)
        return batch | {schema.PIXELS: x_B1HW[:, 0]}
