"""Depth, stride and receptive field: computed by hand, from gradients, and as in papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cxr.models.fcn import FcnBackbone, FullyConvolutional
from cxr.models.receptive_field import ArchitectureSummary, ReceptiveField, receptive_fields, summarize_architecture


class Branches(nn.Module):
    """Two branches with different receptive fields, then a layer after both; also returns the inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 5, stride=3, padding=1)
        self.wide = nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2, padding=2), nn.Conv2d(2, 2, 3, padding="same"))
        self.narrow = nn.AvgPool2d(3, stride=1, padding=1)
        self.end = nn.Conv2d(4, 1, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return x, self.end(torch.cat([self.wide(x), self.narrow(x)], 1))


def seen(layers: nn.Module, image: int, index: int, which: int) -> tuple[int, int]:
    """First and last row of the image on which an output far from the edges depends: all weights are 1."""
    for values in layers.parameters():
        nn.init.ones_(values)
    x = torch.ones(1, 1, image, image, requires_grad=True)
    out = layers(x)[which]
    out[0, 0, index, index].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].sum(1).nonzero().flatten().tolist()
    return rows[0], rows[-1]


def test_receptive_fields_of_a_small_network() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(1, 1, 3, padding=1))
    assert receptive_fields(layers) == [
        ReceptiveField(-2, 5, 2, 2)
    ]  # 3 pixels; 4 after pooling; 4 + 2 · 2, moved by the padding
    assert (receptive_fields(layers)[0].size, receptive_fields(layers)[0].center) == (8, 1.5)
    assert summarize_architecture(layers, layers) == ArchitectureSummary(20, 2, 8, 2)


@pytest.mark.parametrize("which", [0, 1])
def test_receptive_fields_match_gradients(which: int) -> None:
    layers = Branches()
    reach, index = receptive_fields(layers)[which], 5
    moved = index * reach.stride
    assert seen(layers, 96, index, which) == (reach.first + moved, reach.last + moved)
    assert [r.depth for r in receptive_fields(layers)] == [1, 4]


@pytest.mark.parametrize(
    ("name", "convolutions", "millions", "field"), [("alexnet", 8, 57, 355), ("vgg16", 16, 134, 404)]
)
def test_receptive_fields_match_the_paper(name: FcnBackbone, convolutions: int, millions: int, field: int) -> None:
    """Long et al. 2015, table 1. Padding, in which torchvision's AlexNet differs, does not enter."""
    with torch.device("meta"):
        network = FullyConvolutional(name, 32)
    found = summarize_architecture(network, network.encoder_path())
    assert (found.convolutions, found.receptive_field_px, found.stride_px) == (convolutions, field, 32)
    assert round(found.parameters / 1e6) == millions


def test_googlenet_matches_the_paper_except_for_torchvisions_changes() -> None:
    """Its fourth pooling is 2 px wide, not 3, its 5 x 5 convolutions are 3 x 3; and the paper counts the 7 x 7
    pooling before the classifier, which no mask needs."""
    with torch.device("meta"):
        network = FullyConvolutional("googlenet", 32)
        found = summarize_architecture(network, network.encoder_path())
        assert (found.convolutions, found.receptive_field_px, found.stride_px) == (22, 379, 32)
        assert round(found.parameters / 1e6) == 6
        trunk = network.strided
        trunk.maxpool4 = nn.MaxPool2d(3, stride=2)
        for name, layer in trunk.named_modules():
            if name.endswith("branch3.1.conv"):
                layer.kernel_size, layer.padding = (5, 5), (2, 2)
        path = nn.Sequential(network.encoder_path(), nn.AvgPool2d(7, stride=1))
    assert receptive_fields(path)[0].size == 907


class Excited(nn.Module):
    """A convolution whose channels are scaled by their means over the image (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.squeeze(x)


def test_global_branches_are_not_counted() -> None:
    assert receptive_fields(Excited()) == [ReceptiveField(-1, 1, 2, 1)]


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 2, stride=2), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(
    ("layers", "about"),
    [
        (Uneven(), "equal stride"),
        (nn.Conv2d(1, 1, (3, 5)), "both directions"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1)), "not supported"),
        (nn.Upsample(scale_factor=2), "not supported"),
    ],
)
def test_unsupported_layers_are_rejected(layers: nn.Module, about: str) -> None:
    with pytest.raises(ValueError, match=about):
        receptive_fields(nn.Sequential(layers))
