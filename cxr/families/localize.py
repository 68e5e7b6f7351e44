"""Family `localize`: classifies findings and locates them with class activation maps, trained on labels only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.boxes.from_heatmaps import FULL, BoxRule, MapBoxes, boxes_of
from cxr.data.batch import HAS_BOXES, Batch
from cxr.errors import UserError
from cxr.families import box_tuning
from cxr.families.base import Batches, Communicator, one_of, unit_pixels
from cxr.families.box_scores import HeatmapBoxesRecipe
from cxr.families.box_tuning import TuningExample, adjusted
from cxr.families.classifier_base import (
    ClassifierTask,
    balanced_class_weights,
    count_labels,
    label_rows,
)
from cxr.families.image_augmentation import ImageAugmentationRecipe
from cxr.models.classifier import StemStride, load_body
from cxr.models.input_contract import IMAGENET, InputContract
from cxr.models.multiscale_cam import (
    CAM_BACKBONES,
    CamBackbone,
    Combination,
    MultiscaleCAM,
    Pooling,
    StageChoice,
    StageWeights,
)
from cxr.models.pretrained import Fit
from cxr.reporting import attention, figures, palette

HEAT = "heat"  # additional prediction: maps (B, F, h, w), uint8
BOX_THRESHOLDS = "box_thresholds"  # buffer, and additional prediction: of each map, (B, F)
BOX_OFFSETS = "box_offsets"  # buffer, and additional prediction: of the boxes of each map, (B, F, 4)
MIN_IOU = 0.3  # of a predicted and a ground-truth box for the finding to count as located
SHARPENING = 0.3  # fraction of the epochs in which log-sum-exp pooling sharpens
WITHOUT_LAST = "without_last"  # column of an augmented batch: images that are classified without the last stage's map
PICTURED = 8  # images in the picture of a run


@dataclass(frozen=True, kw_only=True)
class LocalizeRecipe(HeatmapBoxesRecipe, ImageAugmentationRecipe):
    """Multiscale class activation maps (Sedai et al. 2018, arXiv 1808.08280).

    The preset `published` has the paper's settings as far as they are known.
    """

    family: ClassVar[str] = "localize"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS, schema.BOXES)
    decision_buffers: ClassVar[tuple[str, ...]] = (
        *HeatmapBoxesRecipe.decision_buffers,
        BOX_THRESHOLDS,
        BOX_OFFSETS,
    )

    size: int = 192
    epochs: int = 20
    batch_size: int = 16
    lr: float = 1e-3

    backbone: CamBackbone = "small"
    """Backbone. small: a ResNet with 250,000 parameters, for CPUs; otherwise a torchvision network."""
    stem_stride: StemStride = 4
    """Downsampling of the backbone's first layers: 4 (as published), 2 or 1. The strides of the four stages are 1, 2,
    4 and 8 times this."""
    cam_stages: StageChoice = "all"
    """Backbone stages that produce maps: all four, or only the last (with pooling mean, this is CAM, Zhou et al.
    2016)."""
    stage_weights: StageWeights = "learned"
    """Weights of the stages' maps: learned per finding, or uniform."""
    pooling: Pooling = "lse"
    """How a map is reduced to a logit: its mean, its max, or log-sum-exp (lse), which is in between."""
    lse_r: float = 6.0
    """Sharpness r of log-sum-exp pooling (Pinheiro and Collobert 2015): near 0 it equals the mean, above 10 nearly
    the maximum."""
    lse_r_start: float = 1.0
    """r of log-sum-exp in the first epoch, if it is below --lse-r. It rises to --lse-r over the first 30 % of the
    epochs: large findings are first learned over their whole area, then small ones at their peak. With fewer than 4
    epochs, r is constant."""
    combine_stages: Combination = "maps"
    """How the stages are combined. logits: each stage's map is pooled, and the logits are combined, as published;
    maps: the maps are combined before pooling, and boxes are made without the map of the last stage. Small findings
    are learned earlier with maps, unless pooling is mean."""
    context_dropout: float = 0.5
    """With --combine-stages maps, fraction of the training images that are classified without the map of the last
    stage, so that the other stages learn every finding."""
    stage_weight_gain: float = 3.0
    """Learning rate of the stage weights, relative to that of other weights. At 1, they stay nearly uniform."""
    pos_weight_power: float = 1.0
    """Exponent p of the weights (N / N_class)^p of the positives and negatives of a finding in the cross-entropy. 1:
    as published (beta_P, beta_N); 0: unweighted. (Family aecnn weights only the positives.)"""

    map_stride: int = 4
    """Input pixels per cell of the maps from which boxes are made."""
    tune_boxes: bool = True
    """With --box-threshold-mode fraction, adjust the boxes of each finding to the validation images with boxes of it.
    With at least 5 such images, its threshold is chosen (Choe et al. 2020). With at least 10, its boxes may also be
    moved and scaled by their median offset from the ground truth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("backbone", self.backbone, CAM_BACKBONES)
        one_of("stem_stride", self.stem_stride, get_args(StemStride))
        one_of("cam_stages", self.cam_stages, get_args(StageChoice))
        one_of("stage_weights", self.stage_weights, get_args(StageWeights))
        one_of("pooling", self.pooling, get_args(Pooling))
        one_of("combine_stages", self.combine_stages, get_args(Combination))
        if not 0 < self.lse_r < math.inf:
            raise UserError(f"lse_r: expected a positive number, got {self.lse_r}")
        if not 0 < self.lse_r_start < math.inf:
            raise UserError(f"lse_r_start: expected a positive number, got {self.lse_r_start}")
        if not 0 <= self.context_dropout <= 1:
            raise UserError(f"context_dropout: expected a number from 0 to 1, got {self.context_dropout}")
        if not 0 < self.stage_weight_gain < math.inf:
            raise UserError(f"stage_weight_gain: expected a positive number, got {self.stage_weight_gain}")
        if not 0 <= self.pos_weight_power <= 2:
            raise UserError(f"pos_weight_power: expected a number from 0 to 2, got {self.pos_weight_power}")
        if self.map_stride < 1 or self.size % self.map_stride:
            raise UserError(f"map_stride: expected a divisor of size={self.size}, got {self.map_stride}")

    def network(self, findings: Sequence[str]) -> MultiscaleCAM:
        return MultiscaleCAM(
            self.backbone,
            findings,
            self.stem_stride,
            stages=self.cam_stages,
            stage_weights=self.stage_weights,
            pooling=self.pooling,
            lse_r=self.first_lse_r,
            combine_stages=self.combine_stages,
            stage_weight_gain=self.stage_weight_gain,
            box_threshold=self.box_threshold,
        )

    @property
    def sharpening_epochs(self) -> int:
        """The number of epochs in which log-sum-exp pooling sharpens."""
        return int(SHARPENING * self.epochs)

    @property
    def first_lse_r(self) -> float:
        """r of log-sum-exp in the first epoch."""
        return min(self.lse_r_start, self.lse_r) if self.sharpening_epochs else self.lse_r

    def task(self, network: nn.Module) -> LocalizeTask:
        return LocalizeTask(self, network)

    @property
    def input_contract(self) -> InputContract:
        return IMAGENET.replace(size=self.size)

    @property
    def torchvision_backbone(self) -> str:
        return "" if self.backbone == "small" else self.backbone

    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        return load_body(_cam(network).trunk, state)

    def shared_settings(self) -> tuple[str, ...]:
        return (*super().shared_settings(), "map_stride")

    def raw_predictions(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Probabilities, and the heat maps that `scored` makes boxes of."""
        _, heat_BFhw, p_BF = attend(_cam(network), unit_pixels(batch, self.size), self.map_stride)
        return {schema.PROBABILITIES: p_BF, HEAT: heat_BFhw}

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The raw predictions, decisions, and the network's thresholds and offsets of boxes."""
        p_BF = raw[schema.PROBABILITIES]
        of_boxes = {
            BOX_THRESHOLDS: network.get_buffer(BOX_THRESHOLDS).expand_as(p_BF),
            BOX_OFFSETS: network.get_buffer(BOX_OFFSETS).expand(*p_BF.shape, 4),
        }
        return super().decide(raw, network) | of_boxes

    def heat_maps(self, network: nn.Module, batch: Batch) -> Tensor:
        """The attention maps that boxes are made of, on the scale of the validation images."""
        _, heat_BFhw, _ = attend(_cam(network), unit_pixels(batch, self.size), self.map_stride)
        return heat_BFhw.float() / FULL

    def predicted_boxes(self, predicted: Mapping[str, Tensor]) -> list[MapBoxes]:
        heat_BFhw = predicted[HEAT].cpu().numpy()
        p_BF, threshold_BF, offset_BF4 = (
            predicted[name].float().cpu().numpy() for name in (schema.PROBABILITIES, BOX_THRESHOLDS, BOX_OFFSETS)
        )
        images = zip(heat_BFhw, p_BF, threshold_BF, offset_BF4, strict=True)
        return [predict_boxes(heat, p, self.box_rule, *tuned) for heat, p, *tuned in images]

    def draw(self, raw: Mapping[str, Tensor], network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """overlay: the map and boxes of the most probable finding."""
        overlays = []
        findings: Sequence[str] = network.findings  # pyright: ignore[reportAssignmentType]
        x = unit_pixels(batch, self.size)
        threshold_F, offset_F4 = _tuned(network)
        shown = (x[:, 0], raw[HEAT], raw[schema.PROBABILITIES])
        for image_HW, heat_Fhw, p_F in zip(*(values.float().cpu().numpy() for values in shown), strict=True):
            f = int(p_F.argmax())
            only = slice(f, f + 1)
            tuned = threshold_F[only], offset_F4[only]
            boxes = predict_boxes(heat_Fhw[only].astype(np.uint8), p_F[only], self.box_rule, *tuned)
            heated = attention.boxed(attention.heated(image_HW, heat_Fhw[f] / FULL), boxes.boxes_N4)
            overlays.append(attention.titled(heated, f"{findings[f]} {p_F[f]:.2f}"))
        return {"overlay": torch.from_numpy(np.stack(overlays))}

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """overlay: see `draw`. stages: the image, each stage's map of the most probable finding, and the attention
        map."""
        cam = _cam(network)
        x = unit_pixels(batch, self.size)
        maps, heat, p = attend(cam, x, self.map_stride)
        by_stage = cam.placed_maps(maps, self.size, self.map_stride)
        stages = []
        for image_HW, stages_SFhw, heat_Fhw, p_F in zip(
            *(values.float().cpu().numpy() for values in (x[:, 0], by_stage, heat, p)), strict=True
        ):
            f = int(p_F.argmax())
            weights = cam.stage_weights()[:, f].tolist()
            tiles = [
                attention.titled(attention.heated(image_HW, map_Fhw[f]), f"stride {reach.stride}: {weight:.2f}")
                for map_Fhw, reach, weight in zip(stages_SFhw, cam.fields, weights, strict=True)
            ]
            heated = attention.heated(image_HW, heat_Fhw[f] / FULL)
            stages.append(np.hstack([attention.colored(image_HW), *tiles, heated]))
        overlay = self.draw({schema.PROBABILITIES: p, HEAT: heat}, network, batch)
        return {**overlay, "stages": torch.from_numpy(np.stack(stages))}

    def raw_evaluation(self, network: nn.Module) -> LocalizeTask:
        return LocalizeTask(self, network)

    def search_space(self) -> dict[str, BaseDistribution]:
        """Learning rate and pooling."""
        return {
            "lr": FloatDistribution(2e-4, 5e-3, log=True),
            "pooling": CategoricalDistribution(list(get_args(Pooling))),
        }


class LocalizeTask(ClassifierTask):
    """A multiscale CAM in training, or the evaluation of an ensemble of them."""

    recipe: LocalizeRecipe

    @property
    def cam(self) -> MultiscaleCAM:
        return _cam(self.network)

    def begin(self, batches: Batches, workers: Communicator) -> None:
        super().begin(batches, workers)
        counts_2F = count_labels(batches, workers, len(self.findings), self.class_weight.device)
        self.class_weight = balanced_class_weights(counts_2F, self.recipe.pos_weight_power)

    def augmented(self, batch: Batch) -> Batch:
        x_B1HW = self.recipe.augment_images(unit_pixels(batch, self.recipe.size))
        changed = batch | {schema.PIXELS: x_B1HW[:, 0]}
        if not self.cam.has_context or not self.recipe.context_dropout:
            return changed
        dropped_B = torch.rand(len(x_B1HW)) < self.recipe.context_dropout
        return changed | {WITHOUT_LAST: dropped_B.to(x_B1HW.device, non_blocking=True)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits_BF = self.network(unit_pixels(batch, self.recipe.size), batch.get(WITHOUT_LAST))
        return {"bce": self.bce(logits_BF, batch[schema.LABELS])}

    def end_epoch(self, workers: Communicator) -> None:
        """Sharpen log-sum-exp pooling for the next epoch. Validation already uses it, unless weights are averaged."""
        recipe = self.recipe
        if recipe.sharpening_epochs:
            factor = (recipe.lse_r / recipe.first_lse_r) ** (1 / recipe.sharpening_epochs)
            self.cam.lse_r.mul_(factor).clamp_(max=recipe.lse_r)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `evaluate_labels` and, if images have boxes, how often a finding is located.

        localization_accuracy_iou30 is the fraction of `boxes_measured` (pairs of an image and a finding with true
        boxes) for which a predicted box has an IoU of at least 0.3 with a true one, in the frame of the network's
        input. The scale of the maps, and the thresholds and offsets of boxes, are chosen here, on the same images,
        and stored in the network.
        """
        f = len(self.findings)
        rows = [torch.zeros(0, 2 * f * (1 + len(self.cam.heads)), device=self.class_weight.device)]
        for batch in batches():
            maps = self.cam.maps(unit_pixels(batch, self.recipe.size))
            means = [map_BFhw.mean((2, 3)) for map_BFhw in maps]
            peaks = [map_BFhw.amax((2, 3)) for map_BFhw in maps]
            rows.append(torch.cat([label_rows(self.cam.logits(maps).sigmoid(), batch), *means, *peaks], 1))
        p_and_labels, map_values = workers.gather(torch.cat(rows)).tensor_split([2 * f], 1)
        if len(p_and_labels):
            labels_NF = p_and_labels[:, f:]
            means_SNF, peaks_SNF = torch.stack(map_values.split(f, 1)).chunk(2)
            low = _mean_where(labels_NF == schema.NEGATIVE, means_SNF)
            self.cam.scale_maps(low, _mean_where(labels_NF == schema.POSITIVE, peaks_SNF))
        boxed = (self._only_boxed(batch) for batch in batches())  # a second pass, now that the scale is known
        examples = [example for batch in boxed for example in self._examples(*batch)]
        return self.evaluate_labels(p_and_labels) | self._tune_boxes(examples, workers)

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        rows, examples = [self.no_rows()], []
        for batch, raw in predictions:
            rows.append(label_rows(raw[schema.PROBABILITIES], batch))
            examples += self._examples(batch, raw[HEAT])
        return self.evaluate_labels(workers.gather(torch.cat(rows))) | self._tune_boxes(examples, workers)

    def _only_boxed(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The images with ground-truth boxes, and their heat maps."""
        index = _images_with_boxes(batch)
        batch = {name: values[index] for name, values in batch.items()}
        if not len(index):
            return batch, torch.zeros(0)
        return batch, attend(self.cam, unit_pixels(batch, self.recipe.size), self.recipe.map_stride)[1]

    def _examples(self, batch: Batch, heat_BFhw: Tensor) -> Iterator[TuningExample]:
        """For each image with ground-truth boxes, an example for each finding that has some."""
        heat = heat_BFhw.cpu().numpy()
        for i in _images_with_boxes(batch).tolist():
            true_N5 = _without_padding(batch[schema.BOXES][i])
            for f in np.unique(true_N5[:, 0]).astype(int):
                true_N4 = true_N5[true_N5[:, 0] == f, 1:]
                yield TuningExample.of(int(f), heat[i, f], true_N4, self.recipe.box_rule, self._thresholds)

    @property
    def _thresholds(self) -> tuple[float, ...]:
        """The thresholds of boxes to choose from; the first is the one that is set."""
        tuned = self.recipe.tune_boxes and self.recipe.box_threshold_mode == "fraction"
        return (self.recipe.box_threshold, *(box_tuning.THRESHOLDS if tuned else ()))

    def _tune_boxes(self, examples: Sequence[TuningExample], workers: Communicator) -> dict[str, float]:
        """Choose the thresholds and offsets of boxes, and measure the boxes that they give."""
        device = self.class_weight.device
        chosen = box_tuning.tune(examples, len(self.findings), self._thresholds, workers, device)
        self.network.get_buffer(BOX_THRESHOLDS).copy_(torch.from_numpy(chosen.thresholds))
        self.network.get_buffer(BOX_OFFSETS).copy_(torch.from_numpy(chosen.offsets))
        if not len(chosen.overlaps):
            return {}
        located = float((chosen.overlaps >= MIN_IOU).mean())
        return {"localization_accuracy_iou30": located, "boxes_measured": float(len(chosen.overlaps))}

    def describe(self) -> dict[str, Any]:
        """Thresholds and offsets of boxes, and thresholds of probabilities. Of a single network, also the stage
        weights by finding, fine stages first, and the scale of the maps, (stages, findings)."""
        stages = {}
        if isinstance(self.network, MultiscaleCAM):
            stages = {
                "stage_weights": dict(zip(self.findings, self.cam.stage_weights().T.tolist(), strict=True)),
                "stage_strides_px": [reach.stride for reach in self.cam.fields],
                "map_scale": {"low": self.cam.low.tolist(), "high": self.cam.high.tolist()},
            }
        buffers = {name: self.network.get_buffer(name).tolist() for name in (BOX_THRESHOLDS, BOX_OFFSETS)}
        of_boxes = {name: dict(zip(self.findings, values, strict=True)) for name, values in buffers.items()}
        return {**stages, **of_boxes, **super().describe()}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """stage_weights.png: the weights of the stages. boxes.png: images with true and predicted boxes, and their
        maps."""
        strides = [f"stride {reach.stride}" for reach in self.cam.fields]
        weights = attention.stage_weights_figure(self.cam.stage_weights().cpu().numpy(), self.findings, strides)
        figures.save_figure(weights, str(folder), "stage_weights.png")
        batch = next(iter(batches()))
        index = _images_with_boxes(batch)[:PICTURED]
        if not len(index):
            index = torch.arange(min(PICTURED, len(batch[schema.PIXELS])))
        batch = {name: values[index] for name, values in batch.items()}
        x = unit_pixels(batch, self.recipe.size)
        _, heat, p = attend(self.cam, x, self.recipe.map_stride)
        true = batch.get(schema.BOXES, torch.zeros(len(x), 0, 5))
        tiles, maps, notes = [], [], []
        for image_HW, heat_Fhw, p_F, boxes in zip(
            x[:, 0].cpu().numpy(), heat.cpu().numpy(), p.float().cpu().numpy(), true, strict=True
        ):
            tile, heated, note = self._tiles(image_HW, heat_Fhw, p_F, _without_padding(boxes))
            tiles.append(tile)
            maps.append(heated)
            notes.append(note)
        figure = figures.picture_rows(
            {"boxes of the finding below": np.stack(tiles) / 255, "its map": np.stack(maps) / 255},
            [image_ids[int(i)] for i in index],
            notes=notes,
            colors={"truth": palette.TRUTH, "prediction": palette.PREDICTION},
            scale=("map", attention.scale_strip()),
        )
        figures.save_figure(figure, str(folder), "boxes.png")

    def _tiles(
        self, image_HW: np.ndarray, heat_FHW: np.ndarray, p_F: np.ndarray, true_N5: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """The image with true and predicted boxes, the map with the predicted ones, and the name and probability, of
        the first finding with ground-truth boxes, or else of the most probable one."""
        f = int(true_N5[0, 0]) if len(true_N5) else int(p_F.argmax())
        predicted = predict_boxes(heat_FHW, p_F, self.recipe.box_rule, *_tuned(self.cam))
        boxes_N4 = predicted.boxes_N4[predicted.index_N == f]
        true_N4 = true_N5[true_N5[:, 0] == f, 1:]
        plain = attention.boxed(attention.colored(image_HW), true_N4, palette.TRUTH)
        heated = attention.boxed(attention.heated(image_HW, heat_FHW[f] / FULL), boxes_N4)
        return attention.boxed(plain, boxes_N4), heated, f"{self.findings[f]} {p_F[f]:.2f}"


def attend(network: MultiscaleCAM, x_B1HW: Tensor, stride: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Each stage's maps; heat maps uint8 (B, F, size / stride, size / stride); probabilities (B, F)."""
    maps = network.maps(x_B1HW)
    heat = network.attention(maps, x_B1HW.shape[-1], stride).mul(FULL).round().to(torch.uint8)
    return maps, heat, network.logits(maps).sigmoid()


def predict_boxes(
    heat_FHW: np.ndarray, p_F: np.ndarray, rule: BoxRule, threshold_F: np.ndarray, offset_F4: np.ndarray
) -> MapBoxes:
    """Boxes of one image. A score is the finding's probability times the mean heat of the box's hot cells.

    Args:
        threshold_F: threshold of each finding's map, for mode fraction.
        offset_F4: offset by which the boxes of each finding are moved and scaled.
    """
    boxes = boxes_of(heat_FHW, rule, threshold_F)
    return MapBoxes(
        boxes.index_N, adjusted(boxes.boxes_N4, offset_F4[boxes.index_N]), boxes.score_N * p_F[boxes.index_N]
    )


def _tuned(network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """The network's thresholds (F,) and offsets (F, 4) of boxes."""
    return network.get_buffer(BOX_THRESHOLDS).cpu().numpy(), network.get_buffer(BOX_OFFSETS).cpu().numpy()


def _cam(network: nn.Module) -> MultiscaleCAM:
    assert isinstance(network, MultiscaleCAM)
    return network


def _images_with_boxes(batch: Batch) -> Tensor:
    """Indices of the images that have ground-truth boxes."""
    if schema.BOXES not in batch:
        return torch.zeros(0, dtype=torch.long)
    return (batch[HAS_BOXES] & ~batch[schema.BOXES][:, 0, 0].isnan()).nonzero()[:, 0]


def _without_padding(boxes_N5: Tensor) -> np.ndarray:
    """The boxes of one image without the NaN rows that fill a batch."""
    return boxes_N5[~boxes_N5[:, 0].isnan()].cpu().numpy()


def _mean_where(rows_NF: Tensor, values_SNF: Tensor) -> Tensor:
    """(S, F) means over the selected rows of each finding; over all rows if none is selected."""
    selected = torch.where(rows_NF.any(0), rows_NF, True).float()
    return (values_SNF * selected).sum(1) / selected.sum(0)
