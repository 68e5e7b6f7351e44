"""Backbones: one interface for networks of torchvision and timm, with their own names of parameters."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from cxr.errors import UserError
from cxr.models.image_backbone import ImageBackbone, image_backbone
from tests.by_family import by_family

SIZE = 64
TOKENS = "timm:vit_tiny_patch16_224"
NAMES = {  # name: side of the grid of cells
    "small": 2,
    "resnet18": 2,
    "densenet121": 2,
    "convnext_tiny": 2,
    "efficientnet_b0": 2,
    "mobilenet_v3_small": 2,
    "regnet_y_400mf": 2,
    "timm:resnet18": 2,
    "timm:convnext_atto": 2,
    "timm:mobilenetv3_small_050": 2,
    TOKENS: 4,
}


@cache
def backbone(name: str, channels: int = 3, *, pools: bool = True) -> ImageBackbone:
    torch.manual_seed(0)
    return image_backbone(name, channels, SIZE, pools=pools).eval()


@cache
def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", by_family(NAMES, quick={"small", "resnet18", "timm:convnext_atto", TOKENS}))
@pytest.mark.parametrize("pools", [True, False])
@torch.no_grad()
def test_features_become_a_vector_per_image_or_per_position(name: str, pools: bool) -> None:
    body = backbone(name, pools=pools)
    features = body(images())
    if pools:
        assert body.pool(features).shape == (2, body.width)
    else:
        assert body.cells(features).shape == (2, body.width, NAMES[name], NAMES[name])


@pytest.mark.slow
@torch.no_grad()
def test_inception_is_built_like_torchvisions() -> None:
    """InceptionV3 needs 75 px or more; its layers are in the order of its blocks."""
    from torchvision import models

    torch.manual_seed(0)
    body = image_backbone("inception_v3", 3, 96).eval()
    whole = models.get_model("inception_v3", weights=None, init_weights=False, aux_logits=False).eval()
    whole.fc = torch.nn.Identity()
    whole.load_state_dict(body.body.state_dict())
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(body.pool(body(x)), whole(x))
    layers = body.layer_of()
    assert layers["Conv2d_1a_3x3.conv.weight"] == 0
    assert layers["Mixed_7c.branch1x1.conv.weight"] == 15
    assert body.width == 2048


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf"])
@torch.no_grad()
def test_pooled_features_equal_the_input_of_torchvisions_last_layer(name: str) -> None:
    from torchvision import models

    whole = models.get_model(name, weights=None).eval()
    own = backbone(name)
    missing, _ = own.body.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    last = [module for module in whole.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole(images())
    torch.testing.assert_close(own.pool(own(images())), seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:convnext_atto", TOKENS])
@torch.no_grad()
def test_pooled_features_equal_those_of_timm(name: str) -> None:
    own = backbone(name)
    torch.testing.assert_close(own.pool(own(images())), own.body(images()))


@torch.no_grad()
def test_tokens_become_cells_in_their_places() -> None:
    """Without position embeddings and attention, a token depends on its own patch only."""
    own = backbone(TOKENS, pools=False)
    tokens = torch.arange(1.0 + 16).view(1, 17, 1).expand(-1, -1, 192)
    assert own.as_map(tokens)[0, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet121", "timm:resnet18", TOKENS])
@torch.no_grad()
def test_images_may_have_one_channel(name: str) -> None:
    own = backbone(name, 1)
    assert own.pool(own(images(1))).shape == (2, own.width)


@pytest.mark.parametrize(
    ("name", "first", "middle", "last", "layers"),
    [
        ("small", "bn1.bias", "layer2.0.conv1.weight", "layer4.0.bn2.weight", 5),
        ("resnet18", "conv1.weight", "layer2.1.conv1.weight", "layer4.1.bn2.weight", 9),
        ("densenet121", "features.conv0.weight", "features.transition2.conv.weight", "features.norm5.weight", 59),
        ("convnext_tiny", "features.0.0.weight", "features.4.1.weight", "classifier.0.weight", 25),
        ("efficientnet_b0", "features.0.0.weight", "features.4.0.block.0.0.weight", "features.8.1.bias", 19),
        ("regnet_y_400mf", "stem.0.weight", "trunk_output.block3.block3-1.f.a.0.weight", None, 17),
        (TOKENS, "patch_embed.proj.weight", "blocks.5.attn.qkv.weight", "norm.weight", 13),
    ],
)
def test_layers_are_numbered_from_the_input(
    name: str, first: str, middle: str, last: str | None, layers: int
) -> None:
    own = backbone(name)
    layer_of = own.layer_of()
    assert set(layer_of) == {name for name, _ in own.body.named_parameters()}
    assert layer_of[first] == 0
    assert 0 < layer_of[middle] < layers - 1
    assert layer_of[last or max(layer_of, key=lambda key: layer_of[key])] == layers - 1
    assert sorted(set(layer_of.values())) == list(range(layers))


@pytest.mark.parametrize("name", ["small", "densenet121", "efficientnet_b0", "timm:resnet18"])
def test_convolutional_networks_know_where_their_cells_lie(name: str) -> None:
    field = backbone(name).receptive_field
    assert field is not None
    assert field.stride == 32


def test_the_cells_of_a_transformer_are_tiles() -> None:
    assert backbone(TOKENS).receptive_field is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "torchvision has no network resnet19"),
        ("timm:cat", "timm has no network cat"),
        ("timm:", "backbone: expected small"),
        ("timm:pit_ti_224", "backbone: timm:pit_ti_224 cannot be used .*group_matcher.*; use another network"),
        ("vit_b_16", "backbone: expected small"),
    ],
)
def test_unknown_networks_are_rejected(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        image_backbone(name, 3, SIZE)


def test_vision_transformers_only_take_sizes_that_whole_patches_fill() -> None:
    with pytest.raises(UserError, match=r"expected a multiple of 16 px.* got 72 px: use 64 or 80"):
        image_backbone(TOKENS, 3, 72)
    assert image_backbone("timm:resnet10t", 3, 72).width == 512


@torch.no_grad()
def test_a_class_token_may_be_added_before_the_last_blocks() -> None:
    body = image_backbone("timm:xcit_nano_12_p16_224", 3, SIZE).eval()
    tokens = torch.rand(1, 16, body.width)
    before = body.as_map(tokens)
    assert torch.equal(body.as_map(torch.cat([torch.zeros(1, 1, body.width), tokens], 1)), before)
