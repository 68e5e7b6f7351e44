"""Class activation maps of several stages, with learned weights (Sedai et al. 2018, arXiv 1808.08280).

A 1 x 1 convolution turns the features of each of a backbone's four stages into one map M per finding. For each
finding, the stages have weights α (the paper's relevance), which are learned and sum to 1. Small findings may be
located where the grid is fine, large ones where receptive fields are large.

The paper (combine_stages "logits") pools the map of each stage and adds the results: the finding's logit is
Σ α pool(M), and the attention map is Σ α n(M), where n(M) are the scaled maps (below), interpolated to one grid. With
"maps", the logit is pool(Σ α M). For average pooling these logits are the same. With log-sum-exp or the maximum, the
gradient of a fine map concentrates where the coarse maps see evidence too. Alone, a fine map has to discover which
few of its thousands of cells a nodule covers. Log-sum-exp pools exp(r Σ α M), a product over the stages, and by
analogy the attention map is Π n(M)^α: coarse maps say which region, fine maps where in it. With one stage and average
pooling, both are CAM (Zhou et al. 2016).

With "maps", the last stage gives context but no position. Its receptive field can be as large as the image; then the
loss does not determine in which cell the evidence for a heart's size appears. Half of the training images are
therefore classified without its map, so that the other stages learn every finding, and the attention map is the
product of the other stages only, whose weights are rescaled to sum to 1.

n maps the values of a stage and finding to one fixed scale, saved in the network: 0 is the mean of the maps in images
without the finding, 1 the mean of the peaks in images with it, both over validation images; values outside are
clipped. A scale per image (min-max, as is common for CAM) would make every map reach 1, including those of absent
findings. A sigmoid would be centered where the loss puts it, which for pooled maps is not evidence at any position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.classifier import Classifier, ClassifierName, StemStride
from cxr.models.input_contract import IMAGENET
from cxr.models.receptive_field import ReceptiveField, receptive_fields
from cxr.precision import in_float32

CamBackbone = Literal[
    "small", "densenet121", "densenet169", "densenet201", "resnet18", "resnet34", "resnet50"
]  # small: a ResNet with a quarter of a million parameters, for CPUs
CAM_BACKBONES: tuple[CamBackbone, ...] = get_args(CamBackbone)
Pooling = Literal["mean", "max", "lse"]
StageChoice = Literal["all", "last"]
StageWeights = Literal["learned", "uniform"]
Combination = Literal["maps", "logits"]

SMALL_WIDTHS = (32, 32, 48, 64, 96)  # channels of the stem and of each stage
_MIN_RANGE = 1e-6  # of a map's scale
_FLOOR = 0.01  # of a stage's map in the geometric mean, so that one stage alone cannot veto a cell


class MultiscaleCAM(nn.Module):
    """Images (B, 1, H, W) in [0, 1] to logits (B, F), float32, and to maps of the findings' locations.

    Args:
        findings: F names.
        stem_stride: see `Classifier`; the stages' strides are 1, 2, 4 and 8 times this.
        stages: all four, or only the last.
        stage_weights: weights of the stages: learned, or uniform.
        pooling: pooling of maps: mean, max, or lse (log-sum-exp), (1 / r) log mean exp(r map).
        lse_r: r in log-sum-exp; it approaches the mean for small r and the maximum for large r. A buffer, so that
            training can change it.
        combine_stages: combine the stages' maps before pooling, or their logits after it, as published.
        stage_weight_gain: how much faster stage weights are learned than others; at 1, they stay nearly uniform.
        box_threshold: fraction of an attention map's maximum above which cells belong to a box, of all findings.

    Raises:
        ValueError: there is no such backbone, pooling, stages, stage_weights or combine_stages.
    """

    pooling: Pooling
    combine_stages: Combination
    stage_weight_logits: Tensor
    thresholds: Tensor
    low: Tensor
    high: Tensor
    box_thresholds: Tensor
    box_offsets: Tensor
    lse_r: Tensor

    def __init__(
        self,
        backbone: CamBackbone,
        findings: Sequence[str],
        stem_stride: StemStride = 4,
        *,
        stages: StageChoice = "all",
        stage_weights: StageWeights = "learned",
        pooling: Pooling = "lse",
        lse_r: float = 6.0,
        combine_stages: Combination = "maps",
        stage_weight_gain: float = 3.0,
        box_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        _one_of(pooling, get_args(Pooling))
        _one_of(stages, get_args(StageChoice))
        _one_of(stage_weights, get_args(StageWeights))
        _one_of(combine_stages, get_args(Combination))
        self.findings, self.pooling, self.combine_stages = tuple(findings), pooling, combine_stages
        self.stage_weight_gain = stage_weight_gain
        self.trunk = BackboneStages(backbone, stem_stride, last_only=stages == "last")
        self.heads = nn.ModuleList([nn.Conv2d(channels, len(findings), 1) for channels in self.trunk.channels])
        self.fields = receptive_fields(self.trunk)
        shape = len(self.heads), len(findings)
        even = torch.zeros(shape)
        if stage_weights == "learned" and stages == "all":
            self.stage_weight_logits = nn.Parameter(even)
        else:
            self.register_buffer("stage_weight_logits", even)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.ones(shape))
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5, dtype=torch.float64))
        self.register_buffer("box_thresholds", torch.full((len(findings),), box_threshold))
        self.register_buffer("box_offsets", torch.zeros(len(findings), 4))
        self.register_buffer("lse_r", torch.tensor(lse_r))

    def forward(self, x_B1HW: Tensor, without_last_B: Tensor | None = None) -> Tensor:
        return self.logits(self.maps(x_B1HW), without_last_B)

    def maps(self, x_B1HW: Tensor) -> list[Tensor]:
        """Each stage's class maps (B, F, h, w), float32, fine grids first."""
        stages = self.trunk(x_B1HW)
        return [head(features).float() for head, features in zip(self.heads, stages, strict=True)]

    @property
    def has_context(self) -> bool:
        """Whether the last stage gives context only; see the module's description."""
        return self.combine_stages == "maps" and len(self.heads) > 1

    def logits(self, maps: Sequence[Tensor], without_last_B: Tensor | None = None) -> Tensor:
        """The findings' logits (B, F), from the stages' maps.

        Args:
            without_last_B: bool, images that are classified without the map of the last stage, if it `has_context`.
        """
        if self.combine_stages == "maps":
            return self._pooled(self._combined(maps, self._weights_of_images(without_last_B)))
        return (self.stage_weights() * torch.stack([self._pooled(map_BFhw) for map_BFhw in maps], 1)).sum(1)

    def _pooled(self, map_BFhw: Tensor) -> Tensor:
        return pool_cells(map_BFhw.flatten(2), self.pooling, self.lse_r)

    def _weights_of_images(self, without_last_B: Tensor | None) -> Tensor:
        """Stage weights of each image, (S, B, F), or of all, (S, 1, F)."""
        if without_last_B is None or not self.has_context:
            return self.stage_weights()[:, None]
        logits_SBF = self._scaled_logits[:, None].repeat(1, len(without_last_B), 1)
        last_BF = logits_SBF[-1].masked_fill(without_last_B[:, None], -math.inf)
        return torch.cat([logits_SBF[:-1], last_BF[None]]).softmax(0)

    def _combined(self, maps: Sequence[Tensor], alpha_SBF: Tensor) -> Tensor:
        """The weighted sum of the stages' maps on the finest grid, (B, F, N, N).

        Args:
            alpha_SBF: weights of the stages, of each image or (S, 1, F) of all.
        """
        finest = self.fields[0]  # its map is not interpolated
        centers_N = torch.arange(maps[0].shape[-1], device=maps[0].device) * finest.stride + finest.center
        stages = zip(alpha_SBF[..., None, None], maps, self.fields, strict=True)
        return sum(
            (alpha_BF11 * resampled(map_BFhw, field, centers_N) for alpha_BF11, map_BFhw, field in stages),
            start=torch.zeros((), device=centers_N.device),
        )

    def stage_weights(self) -> Tensor:
        """(S, F) non-negative weights of the stages, which sum to 1 for each finding."""
        return self._scaled_logits.softmax(0)

    @property
    def _scaled_logits(self) -> Tensor:
        return self.stage_weight_gain * self.stage_weight_logits.float()

    def scale_maps(self, low_SF: Tensor, high_SF: Tensor) -> None:
        """Set the values of each stage's maps that become 0 and 1 in attention maps."""
        self.low.copy_(low_SF)
        self.high.copy_(torch.maximum(high_SF, low_SF + _MIN_RANGE))

    def scaled(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Each stage's maps on the saved scale, in [0, 1]."""
        scales = zip(maps, self.low, self.high, strict=True)
        return [((m - low[:, None, None]) / (high - low)[:, None, None]).clamp(0, 1) for m, low, high in scales]

    def attention(self, maps: Sequence[Tensor], size: int, stride: int) -> Tensor:
        """Attention maps (B, F, size / stride, size / stride) in [0, 1]; cell i covers i to i + 1.

        Args:
            size: height and width of the images in pixels.
            stride: side of a cell in pixels of the image.
        """
        stages = self.placed_maps(maps, size, stride)
        if self.has_context:
            alpha_SF11 = self._scaled_logits[:-1].softmax(0)[..., None, None]
            return (alpha_SF11 * stages[:, :-1].clamp(min=_FLOOR).log()).sum(1).exp()
        return (self.stage_weights()[..., None, None] * stages).sum(1)

    def placed_maps(self, maps: Sequence[Tensor], size: int, stride: int) -> Tensor:
        """Each stage's maps on the grid of `attention`, (B, S, F, size / stride, size / stride)."""
        centers_N = cell_centers(size, stride, maps[0].device)
        stages = zip(self.scaled(maps), self.fields, strict=True)
        return torch.stack([resampled(map_BFhw, field, centers_N) for map_BFhw, field in stages], 1)


def pool_cells(cells_BFN: Tensor, pooling: Pooling, lse_r: float | Tensor) -> Tensor:
    """The N cells of each map pooled to (B, F): their mean, their max, or (1 / r) log mean exp(r cell) (lse)."""
    if pooling == "mean":
        return cells_BFN.mean(2)
    if pooling == "max":
        return cells_BFN.amax(2)
    return (cells_BFN.mul(lse_r).logsumexp(2) - math.log(cells_BFN.shape[2])) / lse_r


class BackboneStages(nn.Module):
    """Images (B, 1, H, W) in [0, 1] to the features of a backbone's stages, (B, C, h, w) each, without negative
    values.

    The parameters of `body` have torchvision's names; the last layer is omitted. A DenseNet's stages are its dense
    blocks, each with the norm that follows it.
    """

    # torchvision's create_feature_extractor (0.29) does not serve: a deep copy of its module is in train mode again,
    # and a copied network would normalize by the statistics of the batch. timm's features_only has other parameter
    # names for DenseNets, and gives their blocks without the norm that follows.

    def __init__(self, backbone: CamBackbone, stem_stride: StemStride = 4, *, last_only: bool = False) -> None:
        super().__init__()
        _one_of(backbone, CAM_BACKBONES)
        self.last_only, self.contract = last_only, IMAGENET
        self.body = SmallResNet(stem_stride) if backbone == "small" else _headless(backbone, stem_stride)
        with torch.no_grad():
            self.channels = [seen.shape[1] for seen in self.eval()(torch.zeros(1, 1, 64, 64))]
        self.train()

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        z_BCHW = self.contract.apply(x_B1HW)
        stages = _dense_stages if hasattr(self.body, "features") else _residual_stages
        seen = stages(self.body, z_BCHW)
        return seen[-1:] if self.last_only else seen


class SmallResNet(nn.Module):
    """A ResNet with one narrow block per stage, with torchvision's parameter names."""

    def __init__(self, stem_stride: StemStride = 4) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock  # imported here because it takes seconds

        self.conv1 = nn.Conv2d(3, SMALL_WIDTHS[0], 5, stride=2 if stem_stride > 1 else 1, padding=2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(SMALL_WIDTHS[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_stride > 2 else nn.Identity()
        for number, (before, after) in enumerate(pairwise(SMALL_WIDTHS), 1):
            stride = 1 if number == 1 else 2
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            block = BasicBlock(before, after, stride, None if (before, stride) == (after, 1) else shortcut)
            setattr(self, f"layer{number}", nn.Sequential(block))


def _headless(backbone: ClassifierName, stem_stride: StemStride) -> nn.Module:
    body = Classifier(backbone, 1, stem_stride).body
    setattr(body, "classifier" if backbone.startswith("densenet") else "fc", nn.Identity())
    return body


def _residual_stages(body: Any, z_BCHW: Tensor) -> list[Tensor]:
    seen = [body.maxpool(body.relu(body.bn1(body.conv1(z_BCHW))))]
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        seen.append(stage(seen[-1]))
    return seen[1:]


def _dense_stages(body: Any, z_BCHW: Tensor) -> list[Tensor]:
    layers, seen = body.features, []
    features = layers.pool0(layers.relu0(layers.norm0(layers.conv0(z_BCHW))))
    for number in (1, 2, 3):
        after = getattr(layers, f"transition{number}")
        seen.append(after.relu(after.norm(getattr(layers, f"denseblock{number}")(features))))
        features = after.pool(after.conv(seen[-1]))
    return [*seen, F.relu(layers.norm5(layers.denseblock4(features)))]


def cell_centers(size: int, stride: int, device: torch.device) -> Tensor:
    """Pixel indices of the centers of cells of `stride` pixels, (size / stride,)."""
    return (torch.arange(size // stride, device=device) + 0.5) * stride - 0.5


@in_float32
def resampled(map_BFhw: Tensor, field: ReceptiveField, centers_N: Tensor) -> Tensor:
    """Maps (B, F, N, N) at these rows and columns, interpolated linearly between the true positions of the values.

    A value's position is the center of its receptive field: `field.center` plus a multiple of the stride. In a ResNet
    this is not the center of the cell; assuming so would shift a map of stride 32 by 15 pixels.

    Args:
        centers_N: pixel indices.
    """
    rows, columns = (_linear_weights(centers_N, cells, field) for cells in map_BFhw.shape[-2:])
    return rows @ (map_BFhw @ columns.T)


def _linear_weights(pixels_N: Tensor, cells: int, field: ReceptiveField) -> Tensor:
    """(N, cells) weights of linear interpolation between receptive-field centers; constant beyond the outermost."""
    position = ((pixels_N - field.center) / field.stride).clamp(0, cells - 1)
    return (1 - (position[:, None] - torch.arange(cells, device=pixels_N.device)).abs()).clamp(min=0)


def _one_of(value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}, got {value}")
