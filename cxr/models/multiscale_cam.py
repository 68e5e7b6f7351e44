"""Class activation maps of several stages, weighted by learned relevance (Sedai et al. 2018, arXiv 1808.08280).

A 1 x 1 convolution turns the features of each of a backbone's four stages into one map M per finding. Each stage has
a relevance α, a softmax over the stages that is learned per finding. Small findings may be located where the grid is
fine, large ones where receptive fields are large.

The paper (fusion "logits") pools the map of each stage and adds the results: the finding's logit is Σ α pool(M), and
the attention map is Σ α n(M), interpolated to one grid. With fusion "maps", the logit is pool(Σ α M). For average
pooling these logits are the same. With log-sum-exp or the maximum, the gradient of a fine map concentrates where the
coarse maps see evidence too. By itself, a fine map would have to find the few of its thousands of cells that a nodule
covers. Log-sum-exp pools exp(Σ α M), a product over the stages, and so the attention map is the product Π n(M)^α:
coarse maps say which region, fine maps where in it. With one stage, both are CAM (Zhou et al. 2016).

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
Relevance = Literal["learned", "uniform"]
Fusion = Literal["maps", "logits"]

SMALL_WIDTHS = (32, 32, 48, 64, 96)  # channels of the stem and of each stage
_MIN_RANGE = 1e-6  # of a map's scale
_FLOOR = 0.01  # of a stage's map in the geometric mean, so that one stage alone cannot veto a cell


class MultiscaleCAM(nn.Module):
    """Images (B, 1, H, W) in [0, 1] to logits (B, F), float32, and to maps of the findings' locations.

    Args:
        findings: F names.
        stem_stride: see `Classifier`; the stages' strides are 1, 2, 4 and 8 times this.
        stages: all four, or only the last.
        relevance: weights of the stages: learned, or uniform.
        pooling: pooling of maps: mean, max, or lse (log-sum-exp), (1 / r) log mean exp(r map).
        lse_r: r in log-sum-exp; it approaches the mean for small r and the maximum for large r.
        fusion: combine the stages' maps before pooling, or their logits after it, as published.
        relevance_gain: how much faster relevance is learned than other weights; at 1 it would stay nearly uniform.
        box_threshold: fraction of an attention map's maximum above which cells belong to a box, of all findings.

    Raises:
        ValueError: there is no such backbone, pooling, stages, relevance or fusion.
    """

    pooling: Pooling
    fusion: Fusion
    relevance_logits: Tensor
    thresholds: Tensor
    low: Tensor
    high: Tensor
    box_thresholds: Tensor

    def __init__(
        self,
        backbone: CamBackbone,
        findings: Sequence[str],
        stem_stride: StemStride = 4,
        *,
        stages: StageChoice = "all",
        relevance: Relevance = "learned",
        pooling: Pooling = "lse",
        lse_r: float = 6.0,
        fusion: Fusion = "logits",
        relevance_gain: float = 10.0,
        box_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        _one_of(pooling, get_args(Pooling))
        _one_of(stages, get_args(StageChoice))
        _one_of(relevance, get_args(Relevance))
        _one_of(fusion, get_args(Fusion))
        self.findings, self.pooling, self.lse_r, self.fusion = tuple(findings), pooling, lse_r, fusion
        self.relevance_gain = relevance_gain
        self.trunk = BackboneStages(backbone, stem_stride, last_only=stages == "last")
        self.heads = nn.ModuleList([nn.Conv2d(channels, len(findings), 1) for channels in self.trunk.channels])
        self.fields = receptive_fields(self.trunk)
        shape = len(self.heads), len(findings)
        even = torch.zeros(shape)
        if relevance == "learned" and stages == "all":
            self.relevance_logits = nn.Parameter(even)
        else:
            self.register_buffer("relevance_logits", even)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.ones(shape))
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5, dtype=torch.float64))
        self.register_buffer("box_thresholds", torch.full((len(findings),), box_threshold))

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return self.logits(self.maps(x_B1HW))

    def maps(self, x_B1HW: Tensor) -> list[Tensor]:
        """Each stage's class maps (B, F, h, w), float32, fine grids first."""
        stages = self.trunk(x_B1HW)
        return [head(features).float() for head, features in zip(self.heads, stages, strict=True)]

    def logits(self, maps: Sequence[Tensor]) -> Tensor:
        """The findings' logits (B, F), from the stages' maps."""
        if self.fusion == "maps":
            return self._pooled(self._fused(maps, self._finest_centers(maps)))
        return (self.relevance() * torch.stack([self._pooled(map_BFhw) for map_BFhw in maps], 1)).sum(1)

    def _pooled(self, map_BFhw: Tensor) -> Tensor:
        return pool_cells(map_BFhw.flatten(2), self.pooling, self.lse_r)

    def _finest_centers(self, maps: Sequence[Tensor]) -> Tensor:
        """Positions in pixels of the rows, or columns, of the finest map: it is not interpolated to be fused."""
        return torch.arange(maps[0].shape[-1], device=maps[0].device) * self.fields[0].stride + self.fields[0].center

    def _fused(self, maps: Sequence[Tensor], centers_N: Tensor) -> Tensor:
        """The sum of the stages' maps, weighted by relevance, (B, F, N, N)."""
        stages = zip(self.relevance(), maps, self.fields, strict=True)
        return sum(
            (alpha_F[:, None, None] * resampled(map_BFhw, field, centers_N) for alpha_F, map_BFhw, field in stages),
            start=torch.zeros((), device=centers_N.device),
        )

    def relevance(self) -> Tensor:
        """(S, F) non-negative weights of the stages, which sum to 1 for each finding."""
        return (self.relevance_gain * self.relevance_logits.float()).softmax(0)

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
        alpha, stages = self.relevance()[..., None, None], self.placed_maps(maps, size, stride)
        if self.fusion == "maps" and len(maps) > 1:
            return (alpha * stages.clamp(min=_FLOOR).log()).sum(1).exp()
        return (alpha * stages).sum(1)

    def placed_maps(self, maps: Sequence[Tensor], size: int, stride: int) -> Tensor:
        """Each stage's maps on the grid of `attention`, (B, S, F, size / stride, size / stride)."""
        centers_N = cell_centers(size, stride, maps[0].device)
        stages = zip(self.scaled(maps), self.fields, strict=True)
        return torch.stack([resampled(map_BFhw, field, centers_N) for map_BFhw, field in stages], 1)


def pool_cells(cells_BFN: Tensor, pooling: Pooling, lse_r: float) -> Tensor:
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
