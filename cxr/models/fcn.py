"""Fully convolutional networks (Long et al. 2015, arXiv 1411.4038): FCN-32s to FCN-8s on torchvision networks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.input_contract import IMAGENET
from cxr.models.receptive_field import receptive_fields
from cxr.models.segmentation_model import ImageHead, Segmenter

FcnBackbone = Literal["alexnet", "vgg16", "googlenet", "resnet18", "resnet34", "resnet50"]
FCN_BACKBONES: tuple[FcnBackbone, ...] = get_args(FcnBackbone)
FcnStride = Literal[32, 16, 8]
Upsampling = Literal["published", "fixed", "learned"]

FC_CHANNELS = 4096
HALF = IMAGENET.replace(mean=(0.5,) * 3, std=(0.5,) * 3)  # GoogLeNet's weights were converted from another library


class _Cut(NamedTuple):
    """The last layers at strides 8, 16 and 32, by their names in torchvision's network, and their channels."""

    layers: tuple[str, str, str]
    channels: tuple[int, int, int]


_RESNET = ("layer2", "layer3", "layer4")
_CUTS: dict[FcnBackbone, _Cut] = {
    "alexnet": _Cut(("features.4", "features.11", "features.12"), (192, 256, 256)),
    "vgg16": _Cut(("features.16", "features.23", "features.30"), (256, 512, 512)),
    "googlenet": _Cut(("inception3b", "inception4e", "inception5b"), (480, 832, 1024)),
    "resnet18": _Cut(_RESNET, (128, 256, 512)),
    "resnet34": _Cut(_RESNET, (128, 256, 512)),
    "resnet50": _Cut(_RESNET, (512, 1024, 2048)),
}


class FullyConvolutional(Segmenter):
    """FCN-`stride`s: scores of the coarsest features are upsampled and added to those of finer features.

    All backbones have features at strides 8, 16 and 32; the paper has skips on VGG16 only. Unlike the paper, the
    image is not padded by 100 px. Instead the fully connected layers are padded, and upsampling places each cell at
    the center of the backbone's receptive field, so that masks are not shifted. As in the paper, scores start at zero
    and upsampling starts as bilinear.

    Args:
        name: a network of torchvision; the parameters of `backbone` have its names.
        stride: stride of the finest features that are scored.
        upsampling: published keeps the last upsampling bilinear and learns the others; fixed learns none; learned
            learns all.
        fully_connected: turn fc6 and fc7 of AlexNet and VGG16 into convolutions of the backbone, as in the paper.
            They have 100 times the parameters of the other layers. False omits them. Other networks have none.

    Raises:
        ValueError: there is no such backbone, stride or upsampling.
    """

    def __init__(
        self,
        name: FcnBackbone = "vgg16",
        stride: FcnStride = 8,
        upsampling: Upsampling = "published",
        fully_connected: bool = True,
    ) -> None:
        for setting, value, allowed in (
            ("backbone", name, FCN_BACKBONES),
            ("stride", stride, get_args(FcnStride)),
            ("upsampling", upsampling, get_args(Upsampling)),
        ):
            if value not in allowed:
                raise ValueError(f"FCN {setting}: expected one of {', '.join(map(str, allowed))}, got {value}")
        super().__init__(HALF if name == "googlenet" else IMAGENET)
        self.strided = StridedBackbone(name, fully_connected)
        self.scores = nn.ModuleDict()
        self.upsampling = nn.ModuleDict()
        used = [at for at in (8, 16, 32) if at >= stride]
        for finer, coarser in zip((1, *used), used, strict=False):
            self._add_level(finer, coarser, upsampling)
        self.image_head = ImageHead(self.strided.channels[32])

    def _add_level(self, finer: int, coarser: int, upsampling: Upsampling) -> None:
        """The scores at stride `coarser`, and their upsampling to stride `finer`."""
        score = nn.Conv2d(self.strided.channels[coarser], 1, 1)
        nn.init.zeros_(score.weight)
        nn.init.zeros_(score.bias)  # pyright: ignore[reportArgumentType]
        self.scores[str(coarser)] = score
        learned = upsampling == "learned" or (upsampling == "published" and finer > 1)
        centers = {1: 0.0} | self.strided.centers
        offset = (centers[coarser] - centers[finer]) / finer
        self.upsampling[str(coarser)] = Upsample(coarser // finer, offset, learned)

    @property
    def backbone(self) -> nn.Module:
        return self.strided

    def encoder_path(self) -> nn.Module:
        return nn.Sequential(self.strided, _Last(), self.scores["32"])

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features: dict[int, Tensor] = dict(zip((8, 16, 32), self.strided(z_BCHW), strict=True))
        used = sorted(map(int, self.scores), reverse=True)
        scores = self.scores["32"](features[32])
        for coarser, finer in pairwise(used):
            skip = self.scores[str(finer)](features[finer])
            scores = self.upsampling[str(coarser)](scores, skip.shape[-2:]) + skip
        mask = self.upsampling[str(used[-1])](scores, z_BCHW.shape[-2:])
        return mask, self.image_head(features[32])


class StridedBackbone(nn.Module):
    """torchvision's network without pooling and classifier: (B, 3, H, W) to features at strides 8, 16 and 32.

    Attributes:
        channels: number of channels by stride.
        centers: by stride, the center of the first cell's receptive field, in pixels of the image.
    """

    def __init__(self, name: FcnBackbone, fully_connected: bool) -> None:
        super().__init__()
        network = _torchvision(name)
        cut = _CUTS[name]
        self.ends = list(cut.layers)
        self.channels: dict[int, int] = dict(zip((8, 16, 32), cut.channels, strict=True))
        for child, layers in network.named_children():
            if child not in ("avgpool", "dropout", "fc", "classifier"):
                self.add_module(child, layers)
        classifier = getattr(network, "classifier", None)
        if fully_connected and classifier is not None:
            self.classifier = _convolutional(classifier, cut.channels[-1])
            self.ends[-1] = f"classifier.{len(self.classifier) - 1}"
            self.channels[32] = FC_CHANNELS
        strides = {field.stride: field.center for field in receptive_fields(self)}
        self.centers = {at: strides[at] for at in (8, 16, 32)}

    def forward(self, z_B3HW: Tensor) -> list[Tensor]:
        x, features = z_B3HW, []
        for name, layer in self._layers():
            x = layer(x)
            if name in self.ends:
                features.append(x)
        return features

    def _layers(self) -> list[tuple[str, nn.Module]]:
        layers = []
        for child, layer in self.named_children():
            inside = child in ("features", "classifier")
            layers += [(f"{child}.{n}", c) for n, c in layer.named_children()] if inside else [(child, layer)]
        return layers


class Upsample(nn.Module):
    """Scores (B, 1, h, w) to a grid `factor` times as fine, float32, by a transposed convolution.

    The kernel starts as bilinear interpolation.

    Args:
        offset: center of the first coarse cell in fine cells, a multiple of 1/2 from 0 to `factor`.
        learned: whether the kernel is a parameter.
    """

    weight: Tensor

    def __init__(self, factor: int, offset: float, learned: bool) -> None:
        super().__init__()
        assert 0 <= offset <= factor, f"offset {offset} of cells {factor} apart"
        assert (2 * offset).is_integer(), f"offset {offset}"
        self.factor, self.offset = factor, offset
        size = (
            2 * factor - offset.is_integer()
        )  # the center of an odd kernel is on a cell, of an even one between two
        self.center = (size - 1) / 2
        triangle = 1 - (torch.arange(size) - self.center).abs() / factor
        kernel = torch.outer(triangle, triangle).view(1, 1, size, size)
        if learned:
            self.weight = nn.Parameter(kernel)
        else:
            self.register_buffer("weight", kernel, persistent=False)

    def forward(self, x_B1hw: Tensor, size: tuple[int, int]) -> Tensor:
        """`size` is the output's height and width. Beyond the outermost centers, the outermost scores are
        repeated."""
        start = round(self.factor + self.center - self.offset)
        below, right = (self._padding(cells, fine) for cells, fine in zip(x_B1hw.shape[-2:], size, strict=True))
        with torch.autocast(x_B1hw.device.type, enabled=False):
            padded = F.pad(x_B1hw.float(), (1, right, 1, below), mode="replicate")
            fine = F.conv_transpose2d(padded, self.weight, stride=self.factor)
        return fine[..., start : start + size[0], start : start + size[1]]

    def _padding(self, cells: int, fine_cells: int) -> int:
        """Number of coarse cells to append so that the last fine cell lies between two coarse ones."""
        return max(0, math.ceil((fine_cells - 1 - self.offset) / self.factor) + 1 - cells)


class _Last(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1]


def _torchvision(name: FcnBackbone) -> nn.Module:
    from torchvision import models as torchvision_models  # imported here because it takes seconds

    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return getattr(torchvision_models, name)(weights=None, **options)


def _convolutional(classifier: nn.Sequential, channels: int) -> nn.Sequential:
    """fc6 and fc7 as convolutions with the same names; the last layer, which has ImageNet's classes, is omitted."""
    layers = list(classifier)[:-1]
    for at, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            side = math.isqrt(layer.in_features // channels)
            convolution = nn.Conv2d(channels, layer.out_features, side, padding=side // 2)
            convolution.load_state_dict(
                {"weight": layer.weight.view_as(convolution.weight), "bias": layer.bias}, assign=True
            )
            layers[at] = convolution
            channels = layer.out_features
    return nn.Sequential(*layers)
