"""The contract of all segmentation networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cxr.models.fcn import FullyConvolutional
from cxr.models.segmentation_model import Segmenter
from cxr.models.unet import SmallUNet, UNet

NETWORKS: dict[str, Callable[[], Segmenter]] = {
    "fcn32s-alexnet": lambda: FullyConvolutional("alexnet", 32, fully_connected=False),
    "fcn8s-googlenet": lambda: FullyConvolutional("googlenet", 8),
    "fcn16s-resnet18": lambda: FullyConvolutional("resnet18", 16, "learned"),
    "unet-scse-resnet18": lambda: UNet("resnet18", "scse"),
    "small": SmallUNet,
}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request: pytest.FixtureRequest) -> Segmenter:
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    for score in getattr(network, "scores", {}).values():
        nn.init.normal_(score.weight, std=0.1)
    return network


@pytest.fixture(autouse=True)
def _as_new(network: Segmenter) -> None:
    network.freeze_backbone(False)
    network.eval()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (75, 100), (40, 33)])
def test_any_size_gives_float_logits_of_that_size(network: Segmenter, height: int, width: int) -> None:
    mask, image = network(torch.rand(2, 1, height, width))
    assert (mask.shape, image.shape) == ((2, 1, height, width), (2,))
    assert mask.dtype == image.dtype == torch.float32
    assert mask.std() > 0


def test_odd_sizes_are_extended_by_repeating_the_last_pixels(network: Segmenter) -> None:
    x = torch.rand(1, 1, 64, 64)
    x[..., 50:] = x[..., 49:50]
    torch.testing.assert_close(network(x[..., :50])[0], network(x)[0][..., :50])


def test_images_do_not_depend_on_the_rest_of_the_batch(network: Segmenter) -> None:
    x = torch.rand(3, 1, 64, 64)
    for whole, alone in zip(network(x), network(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=1e-4)


def test_memory_format_and_bfloat16_have_little_effect(network: Segmenter) -> None:
    x = torch.rand(2, 1, 64, 64)
    mask, image = network(x)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(network(x)[0], mask, atol=1e-3, rtol=1e-3)
    network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_image = network(x)
    assert rough.dtype == rough_image.dtype == torch.float32
    assert (rough - mask).abs().mean() < 0.1 * mask.std() + 0.01 * mask.abs().mean()
    torch.testing.assert_close(rough_image, image, atol=0.1, rtol=0.05)


def test_a_frozen_backbone_is_not_trained_and_everything_else_is(network: Segmenter) -> None:
    network.train().freeze_backbone()
    before = {name: values.clone() for name, values in network.backbone.state_dict().items()}
    mask, image = network(torch.rand(2, 1, 64, 64))
    (mask.mean() + image.mean()).backward()
    frozen = {id(values) for values in network.backbone.parameters()}
    for name, values in network.named_parameters():
        assert (values.grad is None) == (id(values) in frozen), name
    assert not any(module.training for module in network.backbone.modules())
    assert all(torch.equal(before[name], values) for name, values in network.backbone.state_dict().items())
    network.freeze_backbone(False)
    network.zero_grad()
    mask, image = network(torch.rand(2, 1, 64, 64))
    (mask.mean() + image.mean()).backward()
    assert [name for name, values in network.named_parameters() if values.grad is None] == []
    assert all(module.training for module in network.backbone.modules())


def test_a_backbone_is_loaded_from_a_network_that_contains_it(network: Segmenter) -> None:
    other = {f"deep.{name}": values + 0.5 for name, values in network.state_dict().items()}
    network.load_backbone(other)
    inside = next(name for name, part in network.named_modules() if part is network.backbone)
    assert all(
        torch.equal(values, other[f"deep.{inside}.{name}"])
        for name, values in network.backbone.state_dict().items()
        if not name.endswith("tracked")
    )
    with pytest.raises(ValueError, match=r"of the backbone: expected shape .*, got 1; \d+ more"):
        network.load_backbone({name: values.flatten()[:1] for name, values in other.items()})


def test_the_small_network_loads_the_encoder_of_another() -> None:
    trained, small = SmallUNet(), SmallUNet()
    small.load_backbone({f"segmenter.{name}": values for name, values in trained.state_dict().items()})
    torch.testing.assert_close(small.body.down.state_dict(), trained.body.down.state_dict())
