"""Family `attend`: locates findings by comparing aligned X-rays with X-rays without findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema, storage
from cxr.augment.affine_exposure import random_affine
from cxr.boxes import iou
from cxr.boxes.from_heatmaps import BoxRule, MapBoxes, boxes_of
from cxr.data.batch import HAS_BOXES, Batch
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.families.base import Batches, Communicator, one_of, unit_pixels
from cxr.families.box_scores import HeatmapBoxesRecipe
from cxr.families.classifier_base import ClassifierTask, label_rows
from cxr.families.outlines import TRUTH_COLOR, outlined_boxes
from cxr.models import pretrained
from cxr.models.contrast_attention import (
    CONTRAST_BACKBONES,
    ContrastAttention,
    ContrastBackbone,
    ContrastStages,
    contrast,
    load_backbone,
    probabilities,
    warp_boxes,
)
from cxr.models.input_contract import IMAGENET, InputContract
from cxr.models.mil_loss import MILLoss, cells_inside
from cxr.models.pretrained import Fit, Weights
from cxr.models.spatial_transformer import SpatialTransformer, compose, identity, invert, warp
from cxr.reporting import attention, figures

LOGITS = "logits"  # additional prediction: what `scored` makes boxes of
SHA256 = "sha256"  # in `aligner_recipe`: SHA-256 of the aligner's weights, since another aligner is another network
PARTNER = "partner"  # column of an augmented batch: index of the image without findings to compare with
IOU_THRESHOLDS = (0.1, 0.3, 0.5, 0.7)  # for a predicted box to count as correct
UPSAMPLING = 4  # of maps before boxes are made, so that a box may end between two cells
PICTURED = 6  # images in the picture of a run
_HASHES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AttendRecipe(HeatmapBoxesRecipe):
    """Align, attend and locate (CIA-Net, Liu et al., ICCV 2019), which was published without code.

    An aligner maps every image to a common frame, and each image is compared with one without findings. The network
    predicts in which cells of a grid each finding is. It learns this from labels, and from boxes if there are any.
    The paper's settings are size=512 and backbone=resnet50 with all four stages and torchvision's weights; see also
    box_weight.

    In training, an image is compared with another image of the same step. In scoring, where no label may be known, it
    is compared with the mean features of the training images without findings, which are saved in the checkpoint
    together with the aligner.

    ChestX-ray14 has boxes only in its test split, and folds divide the patients of train and val. To train with boxes
    like Li et al. (2018) and Liu et al. (2019), in five folds, list all images of `BBox_List_2017.csv` and all other
    images of their patients in `train_val_list.txt` instead of `test_list.txt`, and set folds=5.
    """

    family: ClassVar[str] = "attend"
    CROP_SETTINGS: ClassVar[tuple[Literal["lung_crop"], ...]] = ("lung_crop",)  # the aligner is a part of the network
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS, schema.BOXES, schema.IMAGE_ID)
    depends_on: ClassVar[Mapping[str, str]] = {"box_weight": "box_fraction"}

    size: int = 128
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    epochs: int = 12
    batch_size: int = 16
    lr: float = 5e-4

    aligner: str = ""
    """URI of a checkpoint of family align. It aligns the images within the network, so images must be stored whole.
    Empty: no alignment."""
    aligner_recipe: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """The recipe in that checkpoint; read from it."""
    backbone: ContrastBackbone = "resnet18"
    """torchvision ResNet whose features are compared."""
    backbone_stages: ContrastStages = 3
    """Number of backbone stages: all 4 (as published) downsample an image by 32, the first 3 by 16."""
    grid: int = 0
    """Number of cells along each side of the grid in which findings are located; the paper uses 16. 0: as in the
    backbone's output."""

    positive_fraction: float | None = 0.5
    """Fraction of an epoch's images that have at least one finding. None: as in the archive."""
    box_weight: float = 1.0
    """Loss weight of a finding with a box, relative to a finding with only a label. Larger values improve
    localization and worsen classification. The paper's value of 5 corresponds to .1 here, because the paper rescales
    the factors of the cells to [.98, 1], which reduces the influence of each cell by a factor of 50."""
    box_fraction: float = 1.0
    """Fraction of the training images with boxes whose boxes are used, selected by a hash of the image id. The other
    images contribute only their labels."""

    rotation_deg: float = 5.0
    """Augmentation: maximum rotation of the aligned image in degrees."""
    max_zoom: float = 1.1
    """Augmentation: maximum zoom factor, in and out. 1: no zoom."""
    translate: float = 0.03
    """Augmentation: maximum translation, as a fraction of the width."""

    min_box_score: float = 0.05
    """A finding with a probability below this value gets no box."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("backbone", self.backbone, CONTRAST_BACKBONES)
        one_of("backbone_stages", self.backbone_stages, get_args(ContrastStages))
        if self.grid < 0:
            raise UserError(f"grid: expected 0 or a number of cells, got {self.grid}")
        for name in ("box_fraction", "min_box_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.positive_fraction is not None and not 0 < self.positive_fraction <= 1:
            raise UserError(
                f"positive_fraction: expected a fraction above 0 and at most 1, or None for the images as they are, "
                f"got {self.positive_fraction}"
            )
        for name, least in (("rotation_deg", 0), ("translate", 0), ("max_zoom", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        try:
            _ = MILLoss(self.box_weight)
        except ValueError as error:
            raise UserError(f"box_weight: {error}") from error

    @property
    def box_rule(self) -> BoxRule:
        """Applied to maps divided by their maximum, so that no map falls below the rule's own minimum."""
        return BoxRule(self.box_threshold_mode, self.box_threshold, max_boxes=self.max_boxes)

    @property
    def cells(self) -> int:
        """Number of cells along each side of the grid, after resolving grid=0."""
        return self.grid or -(-self.size // (32 if self.backbone_stages == 4 else 16))

    @property
    def aligner_size(self) -> int:
        """Input size of the aligner in pixels."""
        return int(self.aligner_recipe.get("size", self.size))

    @property
    def sampled_finding(self) -> str:
        return schema.ANY_FINDING

    def positive_fraction_of(self, epoch: int) -> float | None:
        return self.positive_fraction

    # ---- Network and initial weights

    def network(self, findings: Sequence[str]) -> ContrastAttention:
        assert bool(self.aligner) == bool(self.aligner_recipe), "`resolve_weights` reads the aligner's recipe"
        aligner = self._new_aligner(self.aligner_recipe) if self.aligner else None
        return ContrastAttention(self.backbone, findings, self.cells, self.backbone_stages, aligner)

    def task(self, network: nn.Module) -> AttendTask:
        return AttendTask(self, network)

    @staticmethod
    def _new_aligner(recipe: Mapping[str, Any]) -> SpatialTransformer:
        """An aligner without its weights."""
        return AlignRecipe.from_dict({name: value for name, value in recipe.items() if name != SHA256}).network(())

    @property
    def input_contract(self) -> InputContract:
        return IMAGENET.replace(size=self.size)

    @property
    def torchvision_backbone(self) -> str:
        return self.backbone

    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        return load_backbone(_attention(network), state)

    def initial_weights(self) -> dict[str, str]:
        return {"aligner": "", **super().initial_weights()}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        if setting == "aligner":
            return self._fit_aligner(weights)
        network = ContrastAttention(self.backbone, (), 1, self.backbone_stages)
        return replace(load_backbone(network, weights.state), state=weights.state)

    def _fit_aligner(self, weights: Weights) -> Fit:
        """The weights of an aligner.

        Raises:
            ValueError: they belong to another kind of network, or the aligner cannot be used with these images.
        """
        recipe = weights.about["recipe"] if weights.about else {}
        if recipe.get("family") != AlignRecipe.family:
            raise ValueError(
                f"expected a checkpoint folder of family {AlignRecipe.family!r}, as written by cxr train align"
            )
        if recipe["size"] > self.size:
            raise ValueError(
                f"expected an aligner for images of at most size={self.size} px, got {recipe['size']} px: raise size"
            )
        for name in ("lung_crop", "denoise", "normalize", "equalize"):
            theirs, ours = recipe.get(name) or "none", getattr(self, name) or "none"
            # It only matters whether images are cropped: the lung checkpoint may have been moved.
            same = (theirs == "none") == (ours == "none") if name == "lung_crop" else theirs == ours
            if not same:
                raise ValueError(
                    f"it was trained with {name}={theirs}, but {name} is {ours} here: use the same value"
                )
        return pretrained.match(self._new_aligner(recipe).state_dict(), weights.state, "the aligner", exact=True)

    def load_initial_weights(self, network: nn.Module) -> None:
        super().load_initial_weights(network)
        if (aligner := _attention(network).aligner) is not None:
            aligner.load_state_dict(pretrained.from_uri(self.aligner))

    def resolve_weights(self, out: str) -> tuple[Self, list[str]]:
        resolved, notes = super().resolve_weights(out)
        about = pretrained.about_of(resolved.aligner) if resolved.aligner else None
        recipe = about["recipe"] | {SHA256: about["sha256"]} if about else {}
        return resolved.replace(aligner_recipe=recipe), notes

    def resume_from(self, begun: Mapping[str, Any], out: str) -> tuple[Self, list[str]]:
        same = bool(self.aligner) and pretrained.key(self.aligner) == storage.name(begun["aligner"] or "none")
        known = self.replace(aligner_recipe=begun["aligner_recipe"]) if same else self
        return super(AttendRecipe, known).resume_from(begun, out)

    # ---- Scoring

    def aligned(self, network: ContrastAttention, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images in the common frame, (B, 1, size, size), and the transforms from there to the images, (B, 2, 3)."""
        x = unit_pixels(batch, self.size)
        if network.aligner is None:
            return x, identity(x.shape[0], x.device)  # `len` would fix the size of the batch in an export
        theta = network.theta(unit_pixels(batch, self.aligner_size))
        return warp(x, theta), theta

    def probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        x, _ = self.aligned(_attention(network), batch)
        return probabilities(network(x).float())

    def shared_settings(self) -> tuple[str, ...]:
        return (*super().shared_settings(), "grid", "backbone_stages", "aligner_recipe")

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Probabilities, and what `scored` makes boxes of: logits of cells, transforms to the images."""
        x, theta = self.aligned(_attention(network), batch)
        logits = network(x).float()
        return {schema.PROBABILITIES: probabilities(logits), schema.THETA: theta, LOGITS: logits}

    def combine(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Means of the probabilities of findings and of cells. The transforms are equal: the aligner is the same."""
        cells = torch.stack([raw[LOGITS].sigmoid() for raw in members]).mean(0)
        p_BF = torch.stack([raw[schema.PROBABILITIES] for raw in members]).mean(0)
        return {schema.PROBABILITIES: p_BF, schema.THETA: members[0][schema.THETA], LOGITS: cells.logit(eps=1e-7)}

    def heat_maps(self, network: nn.Module, batch: Batch) -> Tensor:
        """The probabilities of the cells, in the frame of the image; 0 outside the aligned image."""
        x, theta = self.aligned(_attention(network), batch)
        cells = F.interpolate(network(x).float().sigmoid(), scale_factor=UPSAMPLING, mode="bilinear")
        return warp(cells, invert(theta)) if self.aligner else cells

    def predicted_boxes(self, predicted: Mapping[str, Tensor]) -> list[MapBoxes]:
        p_BF, logits, theta = (predicted[name] for name in (schema.PROBABILITIES, LOGITS, schema.THETA))
        return predict_boxes(logits, theta, self.box_rule, self.min_box_score, p_BF)

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """located: the image and, with an aligner, the aligned image, both with the boxes of the finding with the
        highest box score, and its name with this score."""
        x, theta = unit_pixels(batch, self.size), raw[schema.THETA]
        shown = [(x, theta)]
        if self.aligner:
            shown.append((warp(x, theta), identity(len(x))))
        sides, titles = [], list[str]()
        findings: Sequence[str] = network.findings  # pyright: ignore[reportAssignmentType]
        for image, to_image in shown:
            boxes = predict_boxes(raw[LOGITS], to_image, self.box_rule, p_BK=raw[schema.PROBABILITIES])
            titles = titles or [top_title(of_image, findings) for of_image in boxes]
            sides.append(outlined_boxes(image, top_boxes(boxes, self.max_boxes)))
        pictures = torch.cat(sides, 2).numpy()
        named = [attention.titled(picture, title) for picture, title in zip(pictures, titles, strict=True)]
        return {"located": torch.from_numpy(np.stack(named))}

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `draw`."""
        return self.draw(self.raw_predictions(network, batch), network, batch)

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate, weight of boxes, and the backbone's depth unless weights are given for it."""
        space: dict[str, BaseDistribution] = {
            "lr": FloatDistribution(1e-4, 2e-3, log=True),
            "box_weight": FloatDistribution(0.01, 10, log=True),
        }
        return space if self.backbone_pretrained else space | {"backbone_stages": CategoricalDistribution([3, 4])}


class AttendTask(ClassifierTask):
    """A contrast-attention network in training."""

    recipe: AttendRecipe
    negative: Tensor
    """Mean features of the images without findings in the last epoch, (C, grid, grid)."""
    negatives_seen: Tensor
    """Number of those images."""
    _sum: Tensor  # sum of these features in the current epoch
    _count: Tensor

    def __init__(self, recipe: AttendRecipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        mean = self.attention.mean_negative
        self.loss = MILLoss(recipe.box_weight)
        self.register_buffer("negative", torch.zeros_like(mean))
        self.register_buffer("negatives_seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("_sum", torch.zeros_like(mean, dtype=torch.float64), persistent=False)
        self.register_buffer("_count", torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def attention(self) -> ContrastAttention:
        return _attention(self.network)

    def compiled_modules(self) -> list[nn.Module]:
        return [*self.attention.layers(), self.attention.head]

    def augmented(self, batch: Batch) -> Batch:
        """Aligned images with a random rotation, zoom and translation, their boxes, and their partners.

        pixels: (B, size, size). boxes: see `augmented_boxes`. partner: (B,), see `choose_partners`.
        """
        recipe, x = self.recipe, unit_pixels(batch, self.recipe.size)
        theta = random_affine(
            len(x),
            rotation_deg=recipe.rotation_deg,
            max_zoom=recipe.max_zoom,
            translate=recipe.translate,
            device=x.device,
        )
        if self.attention.aligner is not None:
            theta = compose(self.attention.theta(unit_pixels(batch, recipe.aligner_size)), theta)
        without = self.workers.all_rows((batch[schema.LABELS] == schema.NEGATIVE).all(1).to(torch.uint8)) > 0
        return batch | {
            schema.PIXELS: warp(x, theta)[:, 0],
            schema.BOXES: self.augmented_boxes(batch, theta),
            PARTNER: choose_partners(without, self.workers.rank * len(x), len(x)),
        }

    def augmented_boxes(self, batch: Batch, theta: Tensor) -> Tensor:
        """Boxes (B, N, 5) in the frame from which `theta` maps to the images; NaN in images whose boxes are not
        used."""
        true_boxes = batch[schema.BOXES]
        boxes = torch.cat([true_boxes[..., :1], warp_boxes(true_boxes[..., 1:], invert(theta))], -1)
        used = batch[schema.IMAGE_ID] % _HASHES < self.recipe.box_fraction * _HASHES
        return torch.where(used[:, None, None], boxes, torch.nan)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compares each image with its partner, an image without findings from all workers' images of this step.

        If the step has no such image, the mean features of the last epoch are used instead, as in scoring.
        """
        labels = batch[schema.LABELS]
        features = self.attention.features(unit_pixels(batch, self.recipe.size))
        self._remember(features.detach(), (labels == schema.NEGATIVE).all(1))
        partners = partner_features(self.workers.all_rows(features), batch[PARTNER], self.negative)
        marked = cells_inside(batch[schema.BOXES], len(self.findings), self.attention.grid)
        return self.loss(self.attention.located(features, partners), labels, marked)

    def _remember(self, features_BCPP: Tensor, without_B: Tensor) -> None:
        """Add up the features of images without findings."""
        chosen = torch.where(without_B[:, None, None, None], features_BCPP.float(), 0.0)
        self._sum, self._count = self._sum + chosen.sum(0).double(), self._count + without_B.sum()

    def end_epoch(self, workers: Communicator) -> None:
        """Update the mean features from all workers' images without findings in this epoch."""
        sums = workers.sum(torch.cat([self._sum.flatten(), self._count.reshape(1)]))
        total, count = sums[:-1].reshape(self._sum.shape), sums[-1]
        if count > 0:
            self.negative, self.negatives_seen = (total / count).to(self.negative), count.to(self.negatives_seen)
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `evaluate_labels` and, if images have boxes, of localization. Predictions use no label or box.

        localization_accuracy_iou30, for example, is the fraction of findings with ground-truth boxes whose best
        predicted box has an IoU of at least 0.3 with one of them, over all images; `boxes_measured` is the number of
        such findings. The mean features of images without findings are stored in the network here.
        """
        self.attention.mean_negative.copy_(self.negative)
        rows = [self.no_rows()]
        overlaps = [torch.zeros(0, dtype=torch.float64, device=self.negative.device)]
        for batch in batches():
            x, theta = self.recipe.aligned(self.attention, batch)
            logits = self.attention(x)
            rows.append(label_rows(probabilities(logits), batch))
            boxes = predict_boxes(logits, theta, self.recipe.box_rule, self.recipe.min_box_score)
            overlaps.append(torch.from_numpy(best_overlaps(boxes, batch)).to(self.negative.device))
        metrics = self.evaluate_labels(workers.gather(torch.cat(rows)))
        overlaps_N = workers.gather(torch.cat(overlaps))
        if len(overlaps_N):
            for least in IOU_THRESHOLDS:
                correct = (overlaps_N >= least).double().mean()
                metrics[f"localization_accuracy_iou{100 * least:.0f}"] = float(correct)
            metrics["boxes_measured"] = float(len(overlaps_N))
        return metrics

    def describe(self) -> dict[str, Any]:
        return {
            "compared_with": "the mean features of training images without findings",
            "images_without_findings": int(self.negatives_seen),
            **super().describe(),
        }

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """attention.png: images with true and predicted boxes, and the attention; with an aligner, aligned images."""
        batch, recipe = next(iter(batches())), self.recipe
        order = torch.argsort(batch[schema.BOXES][:, 0, 0].isnan().int(), stable=True)[:PICTURED]
        batch = {name: values[order] for name, values in batch.items()}
        x, theta = recipe.aligned(self.attention, batch)
        features = self.attention.features(x)
        logits = self.attention.located(features, self.attention.mean_negative)
        images = unit_pixels(batch, recipe.size)
        on_images, on_aligned = (
            top_boxes(predict_boxes(logits, transform, recipe.box_rule), recipe.max_boxes)
            for transform in (theta, identity(len(x)))
        )
        heat = contrast(features, self.attention.mean_negative)[:, 0]
        pairs = zip(x[:, 0].cpu().numpy(), heat.float().cpu().numpy(), strict=True)
        heated = np.stack([attention.heated(image_HW, heat_hw) for image_HW, heat_hw in pairs]) / 255
        aligned = self.attention.aligner is not None
        rows = {
            "ground-truth boxes": outlined_boxes(images, batch[schema.BOXES][..., 1:], TRUTH_COLOR).numpy() / 255,
            "predicted boxes of the top-scoring finding": outlined_boxes(images, on_images).numpy() / 255,
            **({"the same boxes, aligned": outlined_boxes(x, on_aligned).numpy() / 255} if aligned else {}),
            f"attention{' on the aligned images' if aligned else ''}": heated,
        }
        shown = [image_ids[int(i)] for i in order]
        figure = figures.picture_rows(rows, shown, scale=("attention", attention.scale_strip()))
        figures.save_figure(figure, str(folder), "attention.png")


def choose_partners(without_A: Tensor, first: int, count: int) -> Tensor:
    """(count,) for each of a worker's images, the index of another image without findings; −1 if there is none.

    Sampled uniformly with PyTorch's CPU generator.

    Args:
        without_A: bool, which images of all workers in this step have no findings.
        first: index of the worker's first image among these.
    """
    images = torch.arange(len(without_A), device=without_A.device)
    others_BA = without_A & (images != images[first : first + count, None])
    random_BA = torch.rand(count, len(without_A)).to(without_A.device, non_blocking=True)
    return torch.where(others_BA.any(1), torch.where(others_BA, random_BA, -1).argmax(1), -1)


def partner_features(features_ACPP: Tensor, partner_B: Tensor, mean_CPP: Tensor) -> Tensor:
    """The features of each image's partner among all workers' images; the mean where the partner is −1."""
    none_B = (partner_B < 0)[:, None, None, None]
    return torch.where(none_B, mean_CPP.to(features_ACPP.dtype), features_ACPP[partner_B.clamp(min=0)])


@torch.no_grad()
def predict_boxes(
    logits_BKPP: Tensor, theta: Tensor, rule: BoxRule, min_score: float = 0.0, p_BK: Tensor | None = None
) -> list[MapBoxes]:
    """Boxes of each image, as fractions of the original image; sorted by finding and then by descending score.

    `rule` is applied to each finding's map divided by its maximum: how probable a finding is says nothing about where
    it would be. A score is the finding's probability times the mean of the divided map in the region.

    Args:
        theta: (B, 2, 3) from the frame of the logits to the image.
        min_score: a finding with a lower probability has no box.
        p_BK: probabilities of the findings; None: those of the logits.
    """
    maps = F.interpolate(logits_BKPP.float().sigmoid(), scale_factor=UPSAMPLING, mode="bilinear")
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-30)
    p = (probabilities(logits_BKPP) if p_BK is None else p_BK).double().cpu().numpy()
    boxes = boxes_of(maps.flatten(0, 1).cpu().numpy(), rule)
    image_N, finding_N = np.divmod(boxes.index_N, p.shape[1])
    moved = warp_boxes(torch.from_numpy(boxes.boxes_N4)[:, None], theta.cpu()[torch.from_numpy(image_N)])[:, 0]
    boxes_N4, p_N = moved.clamp(0, 1).numpy(), p[image_N, finding_N]
    by_image = [np.flatnonzero((image_N == i) & (p_N >= min_score)) for i in range(len(p))]
    return [MapBoxes(finding_N[rows], boxes_N4[rows], (p_N * boxes.score_N)[rows]) for rows in by_image]


def best_overlaps(predicted: Sequence[MapBoxes], batch: Batch) -> np.ndarray:
    """For each pair of image and finding with ground-truth boxes: the IoU of the first predicted box with the nearest
    true one, or 0 without a predicted box."""
    overlaps = []
    true_boxes = batch[schema.BOXES].cpu().numpy()
    for boxes, known, true_N5 in zip(predicted, batch[HAS_BOXES].tolist(), true_boxes, strict=True):
        true_N5 = true_N5[~np.isnan(true_N5[:, 0])] if known else true_N5[:0]
        for finding in np.unique(true_N5[:, 0]):
            first = boxes.boxes_N4[boxes.index_N == finding][:1]
            overlaps.append(iou(first, true_N5[true_N5[:, 0] == finding, 1:]).max(initial=0.0))
    return np.array(overlaps, np.float64)


def top_boxes(predicted: Sequence[MapBoxes], max_boxes: int) -> Tensor:
    """(B, max_boxes, 4) boxes of the finding with the highest box score of each image; NaN beyond their number."""
    top = torch.full((len(predicted), max_boxes, 4), torch.nan)
    for i, boxes in enumerate(predicted):
        if len(boxes):
            of_finding = boxes.boxes_N4[boxes.index_N == boxes.index_N[boxes.score_N.argmax()]]
            top[i, : len(of_finding)] = torch.from_numpy(of_finding)
    return top


def top_title(boxes: MapBoxes, findings: Sequence[str]) -> str:
    """The finding with the highest box score, and this score."""
    if not len(boxes):
        return "no box"
    best = boxes.score_N.argmax()
    return f"{findings[boxes.index_N[best]]} {boxes.score_N[best]:.2f}"


def _attention(network: nn.Module) -> ContrastAttention:
    assert isinstance(network, ContrastAttention)
    return network
