"""Fully convolutional networks (Long et al. 2015, arXiv 1411.4038), FCN-32s to -8s, on torchvision's classifiers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.classifier import IMAGENET_MEAN, IMAGENET_STD
from cxr.models.receptive_field import reaches
from cxr.models.smp_unet import ImageHead, Segmenter

FcnBackbone = Literal["alexnet", "vgg16", "googlenet", "resnet18", "resnet34", "resnet50"]
FCN_BACKBONES: tuple[FcnBackbone, ...] = get_args(FcnBackbone)
FcnStride = Literal[32, 16, 8]
Upsampling = Literal["published", "fixed", "learnt"]

FC_CHANNELS = 4096


class _Cut(NamedTuple):
    """The last layers of strides 8, 16 and 32, by their names in torchvision's network, and their channels."""

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
    """FCN-`stride`s: scores of the coarsest features, enlarged and added to those of finer ones, then enlarged.

    Every backbone has the strides 8, 16 and 32 and so takes all three; the paper has skips on VGG16 alone. Other
    than there, the image is not padded by 100 px: the fully connected layers are padded instead, and
    each enlargement puts its cells where the backbone's receptive fields lie, so that masks are not shifted.
    Scores start at zero, enlargement as bilinear, as in the paper.

    Args:
        name: network of torchvision; `backbone` keeps its names of weights.
        stride: of the finest features that are scored.
        upsampling: published: the last enlargement stays bilinear, those before it learn; fixed: none learns;
            learnt: all do.
        fully_connected: AlexNet's and VGG16's fc6 and fc7 become convolutions of the backbone, as in the paper, with
            100 times the parameters of other layers; False leaves them out. The other networks have none.

    Raises:
        ValueError: no such backbone, stride or upsampling.
    """

    def __init__(
        self,
        name: FcnBackbone = "vgg16",
        stride: FcnStride = 8,
        upsampling: Upsampling = "published",
        fully_connected: bool = True,
    ) -> None:
        for value, wanted in (
            (name, FCN_BACKBONES),
            (stride, get_args(FcnStride)),
            (upsampling, get_args(Upsampling)),
        ):
            if value not in wanted:
                raise ValueError(f"FCN with {value!r}: wanted one of {', '.join(map(str, wanted))}")
        half = (0.5, 0.5, 0.5)  # GoogLeNet's weights were converted from another library
        super().__init__(*((half, half) if name == "googlenet" else (IMAGENET_MEAN, IMAGENET_STD)))
        self.trunk = Trunk(name, fully_connected)
        self.scores = nn.ModuleDict()
        self.enlarged = nn.ModuleDict()
        used = [at for at in (8, 16, 32) if at >= stride]
        for finer, coarser in zip((1, *used), used, strict=False):
            self._add_level(finer, coarser, upsampling)
        self.image_head = ImageHead(self.trunk.channels[32])

    def _add_level(self, finer: int, coarser: int, upsampling: Upsampling) -> None:
        """The scores of stride `coarser`, and their enlargement to stride `finer`."""
        score = nn.Conv2d(self.trunk.channels[coarser], 1, 1)
        nn.init.zeros_(score.weight)
        nn.init.zeros_(score.bias)  # pyright: ignore[reportArgumentType]
        self.scores[str(coarser)] = score
        learns = upsampling == "learnt" or (upsampling == "published" and finer > 1)
        centers = {1: 0.0} | self.trunk.centers
        offset = (centers[coarser] - centers[finer]) / finer
        self.enlarged[str(coarser)] = Enlargement(coarser // finer, offset, learns)

    @property
    def backbone(self) -> nn.Module:
        return self.trunk

    def path(self) -> nn.Module:
        return nn.Sequential(self.trunk, _Last(), self.scores["32"])

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features: dict[int, Tensor] = dict(zip((8, 16, 32), self.trunk(z_BCHW), strict=True))
        used = sorted(map(int, self.scores), reverse=True)
        scores = self.scores["32"](features[32])
        for coarser, finer in pairwise(used):
            skip = self.scores[str(finer)](features[finer])
            scores = self.enlarged[str(coarser)](scores, skip.shape[-2:]) + skip
        mask = self.enlarged[str(used[-1])](scores, z_BCHW.shape[-2:])
        return mask, self.image_head(features[32])


class Trunk(nn.Module):
    """torchvision's network without pooling and classifier: (B, 3, H, W) to features of strides 8, 16 and 32.

    Attributes:
        channels: of each stride's features.
        centers: where in the image the first cell of each stride lies: the middle of its receptive field, pixels.
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
        strides = {reach.stride: reach.center for reach in reaches(self)}
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


class Enlargement(nn.Module):
    """Scores (B, 1, h, w) to a grid `factor` times as fine, float32, by a deconvolution that starts as bilinear.

    Args:
        offset: where the first coarse cell's middle lies, in fine cells, whole or half ones; from 0 to `factor`.
        learns: whether the kernel is a parameter.
    """

    weight: Tensor

    def __init__(self, factor: int, offset: float, learns: bool) -> None:
        super().__init__()
        assert 0 <= offset <= factor, f"offset {offset} of cells {factor} apart"
        assert (2 * offset).is_integer(), f"offset {offset}"
        self.factor, self.offset = factor, offset
        size = 2 * factor - offset.is_integer()  # an odd kernel has its middle on a cell, an even one between two
        self.middle = (size - 1) / 2
        falls = 1 - (torch.arange(size) - self.middle).abs() / factor
        kernel = torch.outer(falls, falls).view(1, 1, size, size)
        if learns:
            self.weight = nn.Parameter(kernel)
        else:
            self.register_buffer("weight", kernel, persistent=False)

    def forward(self, x_B1hw: Tensor, size: tuple[int, int]) -> Tensor:
        """`size`: height and width of the output. Beyond the outermost middles the outermost scores go on."""
        start = round(self.factor + self.middle - self.offset)
        below, right = (self._missing(have, want) for have, want in zip(x_B1hw.shape[-2:], size, strict=True))
        with torch.autocast(x_B1hw.device.type, enabled=False):
            padded = F.pad(x_B1hw.float(), (1, right, 1, below), mode="replicate")
            fine = F.conv_transpose2d(padded, self.weight, stride=self.factor)
        return fine[..., start : start + size[0], start : start + size[1]]

    def _missing(self, have: int, want: int) -> int:
        """Cells to add behind the last of `have` ones, so that the last of `want` fine cells has one behind it."""
        return max(0, math.ceil((want - 1 - self.offset) / self.factor) + 1 - have)


class _Last(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1]


def _torchvision(name: FcnBackbone) -> nn.Module:
    from torchvision import models as torchvision_models  # here, for it takes seconds to import

    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return getattr(torchvision_models, name)(weights=None, **options)


def _convolutional(classifier: nn.Sequential, channels: int) -> nn.Sequential:
    """fc6 and fc7 as convolutions, same names; the last layer, which knows ImageNet's classes, is left out."""
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
