"""The common part of classifiers: class weights, a loss for unknown labels, metrics, thresholds and decisions.

A new multi-label classifier extends `ClassifierRecipe`, says what its network is, and registers itself in
`cxr.families`; `tests/families/plain_classifier.py` is a complete example.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.data.batch import Batch
from cxr.families.base import Batches, Communicator, Recipe, ScoringContext, Task, unit_pixels
from cxr.families.capabilities import mean_predictions
from cxr.metrics import classification
from cxr.models import pretrained
from cxr.models.pretrained import Fit, Weights

COUNTED_IMAGES = 20_000  # training images, over all workers, from which the frequency of each finding is estimated


class FindingClassifier(Protocol):
    """A network that predicts the probability of each finding, with a decision threshold for each."""

    findings: tuple[str, ...]
    thresholds: Tensor
    """(F,) Probability from which on a finding is predicted as present. Selected on validation images."""


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Settings of a multi-label classifier of findings."""

    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS)
    score_columns: ClassVar[pa.Schema] = pa.schema(
        [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    )
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "backbone_pretrained")
    decision_buffers: ClassVar[tuple[str, ...]] = ("thresholds",)

    backbone_pretrained: str = ""
    """Initial weights of the backbone: a path or URI of a state dict or checkpoint, or a torchvision name such as
    IMAGENET1K_V1. auto uses torchvision's weights if they can be downloaded. Empty: random weights."""

    @property
    def monitor(self) -> str:
        return "mean_auroc"

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        return {"mean_auroc": "max", "mean_ap": "max"}

    @property
    @abstractmethod
    def torchvision_backbone(self) -> str:
        """The backbone's name in torchvision; empty if torchvision does not have it."""

    @abstractmethod
    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        """Load pretrained weights into the backbone of a network of this recipe.

        Raises:
            ValueError: the weights do not fit.
        """

    def load_initial_weights(self, network: nn.Module) -> None:
        """Load the weights that training starts from; called once, when a new run begins."""
        if self.backbone_pretrained:
            self.load_backbone(network, pretrained.from_uri(self.backbone_pretrained))

    def initial_weights(self) -> dict[str, str]:
        return {"backbone_pretrained": self.torchvision_backbone}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        return replace(self.load_backbone(self.network(("any",)), weights.state), state=weights.state)

    def probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        """Probabilities of the findings, float32 (B, F)."""
        return network(unit_pixels(batch, self.size)).float().sigmoid()

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.decide(self.raw_predictions(network, batch), network)

    # ---- Ensembles: `capabilities.Combinable`

    def shared_settings(self) -> tuple[str, ...]:
        return ("size",)

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {schema.PROBABILITIES: self.probabilities(network, batch)}

    def combine(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return mean_predictions(members)

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The raw predictions and, from the network's thresholds, decisions: int8, 1 for present and 0 for absent."""
        decisions = (raw[schema.PROBABILITIES] >= network.get_buffer("thresholds")).to(torch.int8)
        return {schema.PROBABILITIES: raw[schema.PROBABILITIES], schema.DECISIONS: decisions, **raw}

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        return super().scored(redecided(predicted, context), rows, context)

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {}

    def raw_evaluation(self, network: nn.Module) -> ClassifierTask:
        return ClassifierTask(self, network)


def redecided(predicted: Mapping[str, Tensor], context: ScoringContext) -> dict[str, Tensor]:
    """What `ClassifierRecipe.decide` returned, with decisions by the thresholds of `context` where it has some.
    Decisions of a classifier that was not trained stay unknown."""
    decisions = predicted[schema.DECISIONS].clone()
    for finding, threshold in context.thresholds.items():
        column = context.findings.index(finding)
        positive = predicted[schema.PROBABILITIES][:, column].double() >= threshold
        undecided = decisions[:, column] == schema.UNKNOWN
        decisions[:, column] = torch.where(undecided, decisions[:, column], positive.to(decisions.dtype))
    return {**predicted, schema.DECISIONS: decisions}


class ClassifierTask(Task):
    """A classifier in training. The loss is the binary cross-entropy, and metrics are those of its probabilities.

    Args:
        network: a `FindingClassifier`.
    """

    class_weight: Tensor
    """(2, F) weights of the negatives and of the positives of each finding in the loss."""

    def __init__(self, recipe: ClassifierRecipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network
        self.findings: tuple[str, ...] = tuple(network.findings)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.chosen_thresholds: dict[str, Any] = {}  # those chosen in the last validation, with how they were chosen
        self.register_buffer("class_weight", torch.ones(2, len(self.findings)))

    def begin(self, batches: Batches, workers: Communicator) -> None:
        self.recipe.load_initial_weights(self.network)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"bce": self.bce(self.network(unit_pixels(batch, self.recipe.size)), batch[schema.LABELS])}

    def bce(self, logits_BF: Tensor, labels_BF: Tensor) -> Tensor:
        """Binary cross-entropy with `class_weight`, averaged over images and findings; unknown labels count 0.

        The divisor does not depend on which labels are known, so the mean over workers is that of the whole batch.
        """
        negative_F, positive_F = self.class_weight
        positive_BF, known_BF = labels_BF == schema.POSITIVE, labels_BF != schema.UNKNOWN
        weight = torch.where(positive_BF, positive_F, negative_F) * known_BF
        return F.binary_cross_entropy_with_logits(logits_BF.float(), positive_BF.float(), weight)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `evaluate_labels` on the validation images."""
        return self.evaluate_raw(
            ((batch, self.recipe.raw_predictions(self.network, batch)) for batch in batches()), workers
        )

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        rows = [label_rows(raw[schema.PROBABILITIES], batch) for batch, raw in predictions]
        return self.evaluate_labels(workers.gather(torch.cat([self.no_rows(), *rows])))

    def no_rows(self) -> Tensor:
        """An empty `label_rows`, for a worker whose share has no image."""
        return torch.zeros(0, 2 * len(self.findings), device=self.class_weight.device)

    @torch.no_grad()
    def evaluate_labels(self, rows_N2F: Tensor) -> dict[str, float]:
        """Metrics of all workers' `label_rows`. Chooses the thresholds and stores them in the network.

        mean_auroc and mean_ap are means over the findings with both classes, of which there are `findings_measured`
        (NaN if there are none); auroc/FINDING is the AUROC of one finding. If a network gives probabilities that are
        not finite, it has no metric but mean_auroc, which is NaN, so that it is not ranked.
        """
        probabilities, labels = (half.cpu().numpy() for half in rows_N2F.chunk(2, 1))
        if not np.isfinite(probabilities).all():
            return {"mean_auroc": math.nan}
        chosen = classification.choose_thresholds(probabilities, labels)
        self.network.get_buffer("thresholds").copy_(torch.from_numpy(chosen.values))
        self.chosen_thresholds = {"findings": list(self.findings), **chosen.describe()}
        auroc_F = classification.auroc(probabilities, labels)
        ap_F = classification.average_precision(probabilities, labels)
        measured_F = ~np.isnan(auroc_F)
        by_finding = zip(self.findings, auroc_F, strict=True)
        return {
            "mean_auroc": float(auroc_F[measured_F].mean()) if measured_F.any() else math.nan,
            "mean_ap": float(ap_F[measured_F].mean()) if measured_F.any() else math.nan,
            "findings_measured": float(measured_F.sum()),
            **{f"auroc/{finding}": float(auroc) for finding, auroc in by_finding if not np.isnan(auroc)},
        }

    def describe(self) -> dict[str, Any]:
        return {"thresholds": self.chosen_thresholds} if self.chosen_thresholds else {}


def label_rows(probabilities_BF: Tensor, batch: Batch) -> Tensor:
    """(B, 2F) probabilities and labels, to be gathered from all workers."""
    return torch.cat([probabilities_BF, batch[schema.LABELS].float()], 1)


def count_labels(batches: Batches, workers: Communicator, findings: int, device: torch.device) -> Tensor:
    """(2, F) numbers of negative and positive training images of each finding, at least 1.

    Counts at most `COUNTED_IMAGES` over all workers.
    """
    counts, seen = torch.zeros(2, findings, device=device), 0
    for batch in batches():
        labels = batch[schema.LABELS]
        counts += torch.stack([(labels == value).sum(0) for value in (schema.NEGATIVE, schema.POSITIVE)])
        seen += len(labels)
        if seen >= COUNTED_IMAGES / workers.size:
            break
    return workers.sum(counts).clamp(min=1)


def positive_class_weights(counts_2F: Tensor, power: float) -> Tensor:
    """(2, F) weights that leave negatives at 1 and raise positives to (negatives / positives)^power."""
    negatives_F, positives_F = counts_2F
    return torch.stack([torch.ones_like(negatives_F), (negatives_F / positives_F) ** power])


def balanced_class_weights(counts_2F: Tensor, power: float) -> Tensor:
    """(2, F) weights of both classes, (images / images of the class)^power: Wang et al. 2017's beta_N and beta_P."""
    return (counts_2F.sum(0) / counts_2F) ** power
