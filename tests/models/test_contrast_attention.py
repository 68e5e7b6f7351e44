"""Contrast-induced attention: where it looks, what learns, and boxes moved to another frame and back."""

from __future__ import annotations

import math

import pytest
import torch

from cxr.models.backbones import make_backbone
from cxr.models.classifier import Classifier
from cxr.models.contrast_attention import (
    ContrastAttention,
    ContrastStages,
    contrast,
    load_backbone,
    probabilities,
    resized,
    warp_boxes,
)
from cxr.models.spatial_transformer import SpatialTransformer, bounded_theta, identity, invert, warp

FINDINGS = ("Mass", "Nodule")


def network(stages: ContrastStages = 3, **settings) -> ContrastAttention:
    torch.manual_seed(0)
    return ContrastAttention("resnet18", FINDINGS, 4, stages, **settings)


def test_attention_is_highest_where_any_channel_differs_most() -> None:
    own = torch.rand(2, 3, 4, 4)
    other = own.clone()
    other[0, 1, 2, 3] += 5
    other[0, 2, 0, 0] -= 2
    other[1, 0, 1, 1] -= 0.1
    attention = contrast(own, other)
    assert attention.shape == (2, 1, 4, 4)
    assert attention[0, 0, 2, 3].item() == pytest.approx(1, abs=1e-5)
    assert attention[0, 0, 0, 0].item() == pytest.approx(0.4, abs=1e-5)
    assert attention[1, 0, 1, 1].item() == pytest.approx(1, abs=1e-4), "each image by itself"
    assert attention.sum().item() == pytest.approx(2.4, abs=1e-3)
    assert contrast(own, own).eq(0).all()


def test_one_reference_serves_all_images() -> None:
    own, other = torch.rand(2, 3, 4, 4), torch.rand(3, 4, 4)
    assert torch.equal(contrast(own, other), contrast(own, other.expand(2, -1, -1, -1)))


@pytest.mark.parametrize(("stages", "channels"), [(3, 256), (4, 512)])
def test_features_have_the_requested_grid(stages: ContrastStages, channels: int) -> None:
    net = network(stages).eval()
    for size in (32, 64, 160):
        assert net.features(torch.rand(2, 1, size, size)).shape == (2, channels, 4, 4)
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 2, 4, 4)


def test_features_keep_their_position_on_another_grid() -> None:
    ramp = ((torch.arange(8) + 0.5) / 8).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    for grid in (4, 8, 16):
        wanted = (torch.arange(grid) + 0.5) / grid
        inner = slice(1, -1) if grid > 8 else slice(None)  # the border is repeated, where there is nothing beyond
        assert torch.allclose(resized(ramp, grid)[0, 0, 0][inner], wanted[inner], atol=1e-6)


def test_backbone_and_head_learn_through_the_attention_and_the_aligner_does_not() -> None:
    net = network(aligner=SpatialTransformer(make_backbone("conv3"))).train()
    assert net.aligner is not None
    assert not net.aligner.training, "its statistics would drift"
    x = torch.rand(3, 1, 64, 64)
    own = net.features(x)
    net.located(own, own.roll(1, 0)).square().mean().backward()
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in net.named_parameters() if not name.startswith("aligner.")}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)
    assert net.theta(x).shape == (3, 2, 3)


def test_initial_probabilities_are_low_and_any_cell_can_raise_them() -> None:
    assert probabilities(network().eval()(torch.rand(2, 1, 64, 64))).max() < 0.2
    logits = torch.full((1, 1, 4, 4), -20.0)
    logits[0, 0, 2, 1] = 3
    assert probabilities(logits).item() == pytest.approx(torch.tensor(3.0).sigmoid().item(), abs=1e-4)


def test_weights_of_a_classifier_are_taken_without_their_head() -> None:
    other = Classifier("resnet18", 1000)
    net = network(4)
    load_backbone(net, other.body.state_dict())
    assert torch.equal(net.backbone.body.layer4[1].conv2.weight, other.body.layer4[1].conv2.weight)
    shallow = network(3)
    load_backbone(shallow, other.body.state_dict())
    assert not any("layer4" in name for name in shallow.state_dict())
    with pytest.raises(ValueError, match="expected shape 64 x 64 x 3 x 3, got 64 x 64 x 1 x 1"):
        load_backbone(net, Classifier("resnet50", 3).body.state_dict())


def some_transforms(count: int, transform: str) -> torch.Tensor:
    raw = torch.randn(count, {"similarity": 4, "anisotropic": 5, "affine": 6}[transform])
    return bounded_theta(raw, transform)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("transform", ["similarity", "anisotropic", "affine"])
def test_a_box_warped_forth_and_back_contains_the_original(transform: str) -> None:
    torch.manual_seed(0)
    theta = some_transforms(200, transform)
    low, side = torch.rand(200, 3, 2), 0.5 * torch.rand(200, 3, 2)
    boxes = torch.cat([low, low + side], -1)
    again = warp_boxes(warp_boxes(boxes, theta), invert(theta))
    assert (again[..., :2] <= boxes[..., :2] + 1e-4).all()
    assert (again[..., 2:] >= boxes[..., 2:] - 1e-4).all()
    given, back = ((b[..., :2] + b[..., 2:]) / 2 for b in (boxes, again))
    assert torch.allclose(given, back, atol=1e-4), "the middle stays"


def test_without_rotation_a_box_comes_back_exactly() -> None:
    torch.manual_seed(0)
    raw = torch.randn(50, 5)
    raw[:, 2] = 0
    theta = bounded_theta(raw, "anisotropic")
    boxes = torch.tensor([0.1, 0.3, 0.4, 0.9]).expand(50, 2, 4)
    assert torch.allclose(warp_boxes(warp_boxes(boxes, theta), invert(theta)), boxes, atol=1e-5)


def test_a_box_follows_its_pixels() -> None:
    """A bright rectangle, aligned: the hull of the moved box is the rectangle's own."""
    torch.manual_seed(0)
    x = torch.zeros(8, 1, 200, 200)
    x[:, :, 60:100, 80:140] = 1
    box = torch.tensor([0.4, 0.3, 0.7, 0.5]).expand(8, 1, 4)
    theta = 0.3 * some_transforms(8, "anisotropic") + 0.7 * identity(8)
    for picture, (x0, y0, x1, y1) in zip(warp(x, theta), warp_boxes(box, invert(theta))[:, 0] * 200, strict=True):
        rows, columns = (picture[0] > 0.5).nonzero().unbind(1)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        inside = [min(max(float(edge), 0), 200) for edge in (x0, y0, x1, y1)]
        assert [float(edge) for edge in found] == pytest.approx(inside, abs=3)


def test_missing_boxes_stay_missing() -> None:
    assert warp_boxes(torch.full((1, 2, 4), math.nan), identity(1)).isnan().all()


def test_other_networks_are_rejected() -> None:
    with pytest.raises(ValueError, match="expected backbone resnet18"):
        ContrastAttention("vgg16", FINDINGS, 4)  # pyright: ignore[reportArgumentType]
