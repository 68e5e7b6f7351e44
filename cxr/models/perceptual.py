"""Frozen networks for perceptual losses (Johnson et al. 2016, arXiv 1603.08155).

All take contrast-normalized images (`backbones.normalize_contrast`) and return a list of feature maps, shallow to
deep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models import pretrained
from cxr.models.backbones import conv_blocks, normalize_contrast
from cxr.models.input_contract import IMAGENET
from cxr.models.pretrained import Fit

FeatureKind = Literal["local", "vgg16", "densenet121", "lungs"]
KINDS: tuple[FeatureKind, ...] = get_args(FeatureKind)

# Children of torchvision's `features`, shallow to deep. VGG: relu1_2, relu2_2, …; DenseNet: the stem, the transitions
# between the blocks, and the last block.
LAYERS: dict[str, tuple[str, ...]] = {
    "vgg16": ("3", "8", "15", "22", "29"),
    "densenet121": ("relu0", "transition1", "transition2", "transition3", "norm5"),
}
_PREFIX: dict[FeatureKind, str] = {"vgg16": "features.", "densenet121": "features.", "lungs": "down."}
DEEPEST: dict[FeatureKind, int] = {"local": 4, "vgg16": 5, "densenet121": 5, "lungs": 5}


class FrozenLayers(nn.Module):
    """The children of a sequential network, run in order up to the last one in `names`.

    For torchvision's create_feature_extractor, see `multiscale_cam.BackboneStages`.

    Args:
        sequence: a network whose children are called one after the other.
        names: exact names of the children whose outputs are returned.
        imagenet: the network expects three channels, normalized as for torchvision's weights.

    Raises:
        ValueError: `names` is empty or contains a name that is not a child's.
    """

    def __init__(self, sequence: nn.Module, names: Sequence[str], imagenet: bool) -> None:
        super().__init__()
        children = dict(sequence.named_children())
        missing = [name for name in names if name not in children]
        if missing or not names:
            raise ValueError(f"expected layers among {', '.join(children)}, got {', '.join(missing) or 'none'}")
        last = max(list(children).index(name) for name in names)
        self.children_used = nn.ModuleDict({n: c for i, (n, c) in enumerate(children.items()) if i <= last})
        self.names = frozenset(names)
        self.imagenet = imagenet
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenLayers:
        return super().train(False)

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        x = IMAGENET.apply(as_unit(x_B1HW)) if self.imagenet else x_B1HW
        features = []
        for name, child in self.children_used.items():
            x = child(x)
            if name in self.names:
                features.append(x)
        return features


class LocalFeatures(nn.Module):
    """Features without weights: the contrast-normalized image and its gradients at each level of a pyramid.

    Each level returns (B, 4, h, w): the image, the magnitude of its gradient, and that magnitude times the cosine and
    sine of twice the gradient's angle, so that the sign of an edge does not matter.

    Args:
        levels: number of levels.
        first: the first level that is returned, from 1.
    """

    def __init__(self, levels: int, first: int = 1) -> None:
        super().__init__()
        self.levels, self.first = levels, first

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        features, x = [], x_B1HW.float()
        for level in range(1, self.levels + 1):
            x = F.avg_pool2d(x, 2)
            if level >= self.first:
                features.append(self._level(normalize_contrast(x)))
        return features

    def _level(self, x: Tensor) -> Tensor:
        dx = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
        dy = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
        magnitude = torch.sqrt(dx.square() + dy.square() + 1e-4)
        return torch.cat([x, magnitude, (dx.square() - dy.square()) / magnitude, 2 * dx * dy / magnitude], 1)


def build(kind: FeatureKind, state_dict: Mapping[str, Tensor] | None, last: int, first: int = 1) -> nn.Module:
    """A frozen network that returns its layers `first` to `last`, from 1; random weights without a state dict.

    Raises:
        ValueError: there is no such kind or layer, or the weights do not fit.
    """
    if kind not in KINDS or not 1 <= first <= last <= DEEPEST[kind]:
        raise ValueError(
            f"expected a feature network among {', '.join(KINDS)} and layers from 1 to {DEEPEST.get(kind, 5)}, got "
            f"{kind} and layers {first} to {last}"
        )
    if kind == "local":
        return LocalFeatures(last, first)
    network = _sequential(kind, last) if state_dict is None else _loaded(kind, state_dict, last)
    names = LAYERS.get(kind, tuple(map(str, range(last))))
    return FrozenLayers(network, names[first - 1 : last], imagenet=kind != "lungs")


def needed(kind: FeatureKind, state_dict: Mapping[str, Tensor], layers: int | None = None) -> Fit:
    """The part of a state dict that `build` needs, by default for all layers.

    Raises:
        ValueError: the weights do not fit.
    """
    with torch.device("meta"):
        own = _sequential(kind, layers or DEEPEST[kind]).state_dict()
    return pretrained.match(
        {_PREFIX[kind] + name: values for name, values in own.items()}, state_dict, "the feature network"
    )


def _loaded(kind: FeatureKind, state_dict: Mapping[str, Tensor], layers: int) -> nn.Module:
    weights = {
        name.removeprefix(_PREFIX[kind]): values for name, values in needed(kind, state_dict, layers).state.items()
    }
    with torch.device("meta"):  # initializing VGG16's 120 million unused weights would take seconds
        network = _sequential(kind, layers)
    counters = {name: torch.tensor(0) for name in network.state_dict() if name not in weights}
    network.load_state_dict(counters | weights, assign=True)
    return network


def _sequential(kind: FeatureKind, layers: int) -> nn.Module:
    """A network with random weights whose children are the layers."""
    if kind == "lungs":
        return conv_blocks(layers)
    from torchvision import models as torchvision_models  # imported here because it takes seconds

    return getattr(torchvision_models, kind)(weights=None).features


def as_unit(normalized: Tensor) -> Tensor:
    """Contrast-normalized values as gray values in [0, 1]."""
    return (0.5 + 0.2 * normalized).clamp(0, 1)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared difference; `b` may be the features of one image for all of `a`."""
    return torch.stack([(x.float() - y.float()).square().mean() for x, y in zip(a, b, strict=True)]).mean()
