"""FCNs: upsampling, skips, and masks that are not shifted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.fcn import FcnBackbone, FcnStride, FullyConvolutional, Upsample, Upsampling
from tests.by_family import by_family


@pytest.mark.parametrize("factor", [2, 8, 32])
@pytest.mark.parametrize("learned", [False, True])
def test_upsampling_starts_as_bilinear(factor: int, learned: bool) -> None:
    x = torch.randn(2, 1, 3, 5)
    upsampled = Upsample(factor, (factor - 1) / 2, learned)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(upsampled(x, (3 * factor, 5 * factor)), expected)
    assert len(list(upsampled.parameters())) == learned


def test_upsampling_places_the_first_cell_at_the_offset() -> None:
    line = torch.tensor([[0.0, 1.0, 2.0]]).expand(1, 1, 3, 3)  # rising to the right
    found = Upsample(4, 3.0, False)(line, (13, 13))[0, 0, 6]
    expected = torch.tensor([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("stride", "upsampling", "learned"),
    [(32, "published", 0), (8, "published", 2), (8, "fixed", 0), (8, "learned", 3), (16, "learned", 2)],
)
def test_which_upsampling_layers_are_learned(stride: FcnStride, upsampling: Upsampling, learned: int) -> None:
    with torch.device("meta"):
        network = FullyConvolutional("resnet18", stride, upsampling)
    assert len(list(network.upsampling.parameters())) == learned
    assert sorted(network.scores) == sorted(str(at) for at in (8, 16, 32) if at >= stride)


@torch.no_grad()
def test_scores_start_at_zero_and_skips_add_detail() -> None:
    torch.manual_seed(1)
    network, x = FullyConvolutional("resnet18", 8).eval(), torch.rand(1, 1, 128, 128)
    assert not network(x)[0].any()
    nn.init.normal_(network.scores["32"].weight)
    coarse = _bends(network(x)[0])
    nn.init.normal_(network.scores["8"].weight)
    assert _bends(network(x)[0]) > 2 * coarse > 0


def _bends(mask: Tensor) -> Tensor:
    """Mean second difference of pixels 8 apart, as a share of the deviation."""
    return mask[0, 0].unfold(1, 17, 1)[..., ::8].diff(n=2).abs().mean() / mask.std()


@pytest.mark.parametrize("name", by_family(["alexnet", "googlenet", "resnet18"], quick={"googlenet"}))
@pytest.mark.parametrize(("stride", "scored"), [(8, "8"), (8, "32"), (32, "32")])
def test_masks_are_not_shifted(name: FcnBackbone, stride: FcnStride, scored: str) -> None:
    """The center of a disc stays in place in layers that only average."""
    network = FullyConvolutional(name, stride, fully_connected=False).eval()
    for layer in network.strided.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.ones_(network.scores[scored].weight)
    at = torch.arange(544.0)
    disc = ((at[:, None] - 250).square() + (at - 300).square() < 30**2).float()
    with torch.no_grad():
        mask = network.segment(disc.expand(1, 3, -1, -1))[0][0, 0]
    row, column = (mask * at[:, None]).sum() / mask.sum(), (mask * at).sum() / mask.sum()
    assert abs(row - 250) < 2
    assert abs(column - 300) < 2


def test_fully_connected_layers_become_convolutions() -> None:
    """Where a receptive field covers the whole image of 224 px, AlexNet's fc7 has the values of the classifier."""
    from torchvision.models import alexnet

    given = alexnet(weights=None, num_classes=3).eval()
    network = FullyConvolutional("alexnet", 32).eval()
    network.load_backbone(given.state_dict())
    z = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = network.strided(z)[-1]
        expected = given.classifier[:-1](given.features(z).flatten(1))
    assert features.shape == (1, 4096, 7, 7)
    torch.testing.assert_close(features[:, :, 3, 3], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vgg16", "googlenet", "resnet50"])
def test_torchvisions_weights_fit(name: FcnBackbone) -> None:
    from torchvision import models

    with torch.device("meta"):
        options = {"init_weights": False} if name == "googlenet" else {}
        state = getattr(models, name)(weights=None, **options).state_dict()
        network = FullyConvolutional(name, 8)
        network.load_backbone(state)
        state.popitem()  # of the last layer, which is not expected
        network.load_backbone(state)
        del state[next(iter(state))]
        with pytest.raises(ValueError, match="lack 1 of"):
            network.load_backbone(state)


@pytest.mark.parametrize("wrong", [{"name": "densenet121"}, {"stride": 4}, {"upsampling": "nearest"}])
def test_unknown_settings_are_rejected(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        FullyConvolutional(**wrong)  # pyright: ignore[reportArgumentType]
