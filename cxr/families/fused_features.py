"""Feature-level fusion: the pooled features of several classifiers' backbones, which one head classifies.

As an ensemble, the joined network is one checkpoint, and its members apply their own input contracts, so that
backbones may differ in size and normalization. Only the head is trained, on stored embeddings
(`families.head_training`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families.base import Recipe
from cxr.families.capabilities import combinable, embedder
from cxr.families.classify import ClassifyRecipe
from cxr.families.ensemble import EnsembleRecipe, check_images
from cxr.families.head_training import without_head
from cxr.models.ensemble import FusedFeatures
from cxr.models.image_classifier import POOLED_HEADS, HeadName, ImageClassifier, classification_layers


@dataclass(frozen=True, kw_only=True)
class FusedFeaturesRecipe(EnsembleRecipe):
    """Features of several classifiers, which one head classifies."""

    family: ClassVar[str] = "fused"
    own_settings: ClassVar[tuple[str, ...]] = ("head",)

    head: HeadName = "linear"
    """Classifier on all features: linear or mlp, see `ClassifyRecipe.head`."""

    @classmethod
    def of(cls, members: Sequence[Recipe], head: HeadName = "linear") -> Self:
        """The fusion of networks with these recipes.

        Raises:
            UserError: they see different images, or are not of family classify; or another head.
        """
        for recipe in members:
            if not isinstance(recipe, ClassifyRecipe):
                raise UserError(f"expected checkpoints of family classify, got {recipe.family}: use others")
        if head not in POOLED_HEADS:
            raise UserError(f"head={head}: expected {' or '.join(POOLED_HEADS)} on the features of several networks")
        check_images(members)
        return cls.around(members, head=head)

    def __post_init__(self) -> None:
        """Heat maps of an ensemble are those of its members' own heads, which are dropped here."""
        Recipe.__post_init__(self)

    def with_tta_flip(self, on: bool) -> Self | None:
        return None

    def network(self, findings: Sequence[str]) -> FusedFeatures:
        members = [recipe.network(findings) for recipe in self.recipes]
        width = sum(member.backbone.width for member in members if isinstance(member, ImageClassifier))
        return FusedFeatures(members, findings, classification_layers(self.head, width, len(findings)))

    def embed(self, network: nn.Module, batch: Batch) -> Tensor:
        """(B, D) the members' embeddings side by side, float32; see `capabilities.Embedder`."""
        assert isinstance(network, FusedFeatures)
        pairs = zip(self.recipes, network.members, strict=True)
        return torch.cat([embedder(recipe).embed(member, batch) for recipe, member in pairs], 1)

    def raw_predictions(self, network: nn.Module, batch: Batch, only: Sequence[int] = ()) -> dict[str, Tensor]:
        """Probabilities before thresholds; all members are needed."""
        assert not only
        return self._classified(network, self.embed(network, batch))

    def predict_and_embed(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        embeddings_BD = self.embed(network, batch)
        return combinable(self.first).decide(self._classified(network, embeddings_BD), network), embeddings_BD

    def _classified(self, network: nn.Module, embeddings_BD: Tensor) -> dict[str, Tensor]:
        assert isinstance(network, FusedFeatures)
        return {schema.PROBABILITIES: network.head(embeddings_BD).float().sigmoid()}


def fuse(
    members: Sequence[nn.Module], recipe: FusedFeaturesRecipe, findings: Sequence[str], head: nn.Module
) -> FusedFeatures:
    """A network with the backbones of trained members and a trained head, for these findings."""
    network = recipe.network(findings)
    for own, member in zip(network.members, members, strict=True):
        own.load_state_dict(without_head(member), strict=False)
    network.head = head
    return network.eval()
