"""Feature networks: exact layer names, frozen weights, local features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121, vgg16

from cxr.models import perceptual
from cxr.models.backbones import make_backbone
from cxr.models.perceptual import FeatureKind, FrozenLayers
from cxr.models.small_unet import LungField
from cxr.models.spatial_transformer import SpatialTransformer
from tests.by_family import by_family

SIZES: dict[FeatureKind, list[tuple[int, int]]] = {  # channels, height at an input of 64
    "vgg16": [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)],
    "densenet121": [(64, 32), (128, 8), (256, 4), (512, 2), (1024, 2)],
    "local": [(4, 32), (4, 16), (4, 8), (4, 4)],
    "lungs": [(16, 32), (32, 16), (64, 8), (96, 4), (128, 2)],
}


@pytest.mark.parametrize("kind", by_family(perceptual.KINDS, quick={"local", "lungs"}))
def test_layers_run_from_shallow_to_deep(kind: FeatureKind) -> None:
    x = torch.randn(1, 1, 64, 64)
    for layers in (1, len(SIZES[kind])):
        features = perceptual.build(kind, None, layers)(x)
        assert [(f.shape[1], f.shape[2]) for f in features] == SIZES[kind][:layers]


@pytest.mark.parametrize("kind", ["local", "lungs"])
def test_layers_can_start_deeper(kind: FeatureKind) -> None:
    x = torch.randn(1, 1, 64, 64)
    torch.manual_seed(0)
    features = perceptual.build(kind, None, 3)(x)
    torch.manual_seed(0)
    deeper = perceptual.build(kind, None, 3, first=2)(x)
    assert len(deeper) == 2
    assert all(torch.equal(a, b) for a, b in zip(features[1:], deeper, strict=True))


def test_names_are_compared_exactly() -> None:
    """ "1" is part of "10" and of "11", but names one layer."""
    steps = nn.Sequential(*[AddOne() for _ in range(12)])
    features = FrozenLayers(steps, ["1", "10"], imagenet=False)(torch.zeros(1, 1, 1, 1))
    assert [f.item() for f in features] == [2, 11]


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match="relu"):
        FrozenLayers(nn.Sequential(AddOne()), ["relu"], imagenet=False)


def test_vgg_layers_equal_those_of_torchvision() -> None:
    network = vgg16(weights=None).eval()
    frozen = perceptual.build("vgg16", network.state_dict(), 2)
    x = torch.randn(1, 1, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rgb = (perceptual.as_unit(x).expand(1, 3, 32, 32) - mean[:, None, None]) / std[:, None, None]
    wanted = network.features[:9](rgb)  # up to relu2_2
    torch.testing.assert_close(frozen(x)[1], wanted)


def test_only_the_requested_layers_remain() -> None:
    deep, shallow = (perceptual.build("densenet121", None, n) for n in (5, 1))
    count = [sum(p.numel() for p in net.parameters()) for net in (deep, shallow)]
    assert count[1] < 0.01 * count[0]


def test_weights_stay_frozen_and_in_eval_mode() -> None:
    network = perceptual.build("densenet121", densenet121(weights=None).state_dict(), 2)
    holder = nn.ModuleList([network]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_weights_of_another_network_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"features\.conv0\.weight|lack"):
        perceptual.build("densenet121", vgg16(weights=None).state_dict(), 1)


def test_lung_features_are_the_lung_networks_encoder_alone_or_inside_an_aligner() -> None:
    lungs = LungField()
    aligner = SpatialTransformer(make_backbone("conv4", 2), lungs=lungs)
    x = torch.randn(1, 1, 32, 32)
    for state in (lungs.state_dict(), aligner.state_dict()):
        frozen = perceptual.build("lungs", state, 2)
        torch.testing.assert_close(frozen(x)[1], lungs.down[:2](x))


def test_local_features_see_edges_without_sign_and_pass_gradients() -> None:
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:] = 1
    network = perceptual.build("local", None, 1)
    edge, flipped = network(x)[0], network(1 - x)[0]
    torch.testing.assert_close(edge[:, 1:], flipped[:, 1:], atol=1e-4, rtol=0)
    row = edge[0, 2, 8]
    assert row[7:9].min() > 0.5  # across an upright edge, cos 2·0 = 1
    x.requires_grad_()
    perceptual.feature_distance(network(x), network(x.detach().flip(3))).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "layers"), [("vgg16", 6), ("vgg16", 0), ("local", 5), ("resnet", 1)])
def test_layers_that_do_not_exist_are_rejected(kind: FeatureKind, layers: int) -> None:
    with pytest.raises(ValueError, match="expected a feature network"):
        perceptual.build(kind, None, layers)


def test_feature_distance_is_the_mean_over_layers() -> None:
    a = [torch.zeros(2, 1, 2, 2), torch.zeros(2, 3, 1, 1)]
    b = [torch.ones(1, 1, 2, 2), 3 * torch.ones(1, 3, 1, 1)]
    assert perceptual.feature_distance(a, b).item() == pytest.approx((1 + 9) / 2)
