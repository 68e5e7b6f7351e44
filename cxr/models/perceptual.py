"""Frozen networks whose features compare pictures (perceptual loss, Johnson et al. 2016, arXiv 1603.08155).

All take contrast-normalised images (`backbones.normalise_contrast`) and give a list of feature maps,
shallow to deep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import conv_blocks, normalise_contrast
from cxr.models.classifier import COUNTER, IMAGENET_MEAN, IMAGENET_STD

FeatureKind = Literal["local", "vgg16", "densenet121", "lungs"]
KINDS: tuple[FeatureKind, ...] = get_args(FeatureKind)

# Children of torchvision's `features`, shallow to deep: relu1_2, relu2_2, … of VGG; the stem, then the
# transitions between DenseNet's blocks, then its last block.
LAYERS: dict[str, tuple[str, ...]] = {
    "vgg16": ("3", "8", "15", "22", "29"),
    "densenet121": ("relu0", "transition1", "transition2", "transition3", "norm5"),
}
DEEPEST: dict[FeatureKind, int] = {"local": 4, "vgg16": 5, "densenet121": 5, "lungs": 5}


class FrozenLayers(nn.Module):
    """The named children of a sequential network, run in order up to the last that is wanted.

    Args:
        sequence: its children are called one after the other.
        names: exact names of the children whose outputs are wanted.
        imagenet: expects three channels, normalised as torchvision's weights expect.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sequence: nn.Module, names: Sequence[str], imagenet: bool) -> None:
        super().__init__()
        children = dict(sequence.named_children())
        missing = [name for name in names if name not in children]
        if missing or not names:
            raise ValueError(f"layers {missing or 'none'}: wanted some of {', '.join(children)}")
        last = max(list(children).index(name) for name in names)
        self.children_used = nn.ModuleDict({n: c for i, (n, c) in enumerate(children.items()) if i <= last})
        self.names = frozenset(names)
        self.imagenet = imagenet
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenLayers:
        return super().train(False)

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        x = (as_unit(x_B1HW).expand(-1, 3, -1, -1) - self.mean) / self.std if self.imagenet else x_B1HW
        features = []
        for name, child in self.children_used.items():
            x = child(x)
            if name in self.names:
                features.append(x)
        return features


class LocalFeatures(nn.Module):
    """What needs no weights: at each level of a pyramid the contrast-normalised image and its gradients.

    Each level gives (B, 4, h, w): the image, the gradient's size, and that size times cosine and sine of
    twice the gradient's angle, since an edge has no sign.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        features, x = [], x_B1HW.float()
        for _ in range(self.levels):
            x = F.avg_pool2d(x, 2)
            features.append(self._level(normalise_contrast(x)))
        return features

    def _level(self, x: Tensor) -> Tensor:
        dx = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
        dy = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
        size = torch.sqrt(dx.square() + dy.square() + 1e-4)
        return torch.cat([x, size, (dx.square() - dy.square()) / size, 2 * dx * dy / size], 1)


def build(kind: FeatureKind, state_dict: Mapping[str, Tensor] | None, layers: int) -> nn.Module:
    """A frozen feature network that gives its `layers` shallowest layers; None for random weights.

    Raises:
        ValueError: unknown kind, more layers than it has, or weights of another network.
    """
    if kind not in KINDS or not 1 <= layers <= DEEPEST[kind]:
        raise ValueError(
            f"{layers} layers of {kind!r}: wanted one of {', '.join(KINDS)} and 1–{DEEPEST.get(kind, 5)}"
        )
    if kind == "local":
        return LocalFeatures(layers)
    if kind == "lungs":
        return _lung_encoder(state_dict, layers)
    from torchvision import models as torchvision_models  # here, for it takes seconds to import

    network = getattr(torchvision_models, kind)(weights=None).features
    _load(network, state_dict, "features.")
    return FrozenLayers(network, LAYERS[kind][:layers], imagenet=True)


def as_unit(normalised: Tensor) -> Tensor:
    """Contrast-normalised values as gray levels in [0, 1]."""
    return (0.5 + 0.2 * normalised).clamp(0, 1)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared difference; `b` may be one picture for all of `a`."""
    return torch.stack([(x.float() - y.float()).square().mean() for x, y in zip(a, b, strict=True)]).mean()


def _lung_encoder(state_dict: Mapping[str, Tensor] | None, layers: int) -> FrozenLayers:
    """From an aligner's state, or that of its lung network alone."""
    blocks = conv_blocks(layers)
    inside = any(name.startswith("lungs.") for name in state_dict or ())
    _load(blocks, state_dict, "lungs.down." if inside else "down.")
    return FrozenLayers(blocks, [str(i) for i in range(layers)], imagenet=False)


def _load(network: nn.Module, state_dict: Mapping[str, Tensor] | None, prefix: str) -> None:
    """Load the entries named `prefix` + the network's exact names, wherever a larger network holds these."""
    if state_dict is None:
        return
    first = prefix + next(iter(network.state_dict()))
    outer = next((name.removesuffix(first) for name in state_dict if name.endswith(f".{first}")), "")
    prefix = outer + prefix
    wanted = {name: state_dict[prefix + name] for name in network.state_dict() if prefix + name in state_dict}
    missing = {name for name in network.state_dict() if not name.endswith(COUNTER)} - set(wanted)
    if missing:
        example = prefix + min(missing)
        raise ValueError(f"the weights lack {len(missing)} tensors of the feature network, {example} for one")
    network.load_state_dict(network.state_dict() | wanted)
