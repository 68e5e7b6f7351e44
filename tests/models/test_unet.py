"""U-Nets: attention, pretrained weights, no downloads."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.augment.image_mask import Variation, augment_with_masks
from cxr.models.receptive_field import summarize_architecture
from cxr.models.segmentation_loss import MaskLoss, image_loss
from cxr.models.small_unet import soft_dice
from cxr.models.unet import SmallUNet, SubpixelHead, UNet


def test_torchvision_weights_fit_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import resnet18

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    network, given = UNet("resnet18").eval(), resnet18(weights=None).eval()
    network.load_backbone({name: v for name, v in given.state_dict().items() if not name.endswith("tracked")})
    z = torch.randn(1, 3, 64, 64)
    stem = given.maxpool(given.relu(given.bn1(given.conv1(z))))
    deepest = given.layer4(given.layer3(given.layer2(given.layer1(stem))))
    torch.testing.assert_close(network.backbone(z)[-1], deepest)


def test_attention_adds_few_parameters() -> None:
    plain, scse = UNet("resnet18"), UNet("resnet18", "scse")
    sizes = [summarize_architecture(net, net.encoder_path()) for net in (plain, scse)]
    assert sizes[0].parameters < sizes[1].parameters < 1.02 * sizes[0].parameters
    assert sizes[0].receptive_field_px == sizes[1].receptive_field_px == 435
    assert any("cSE" in name for name, _ in scse.named_modules())


def test_the_subpixel_head_keeps_pixel_positions() -> None:
    head, z = SubpixelHead(16), torch.rand(2, 1, 8, 12)
    seen: list[Tensor] = []
    head.mix.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 16:]))
    head(torch.zeros(2, 16, 4, 6), z)
    assert torch.equal(F.pixel_shuffle(seen[0], 2), z)


@pytest.mark.slow
def test_bright_discs_are_learned_from_augmented_pairs() -> None:
    torch.manual_seed(0)
    network, loss = SmallUNet().train(), MaskLoss(focal_weight=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(60):
        x, mask = augment_with_masks(*_discs(8), Variation())
        found, present = network(x)
        terms = [*loss(found, mask).values(), 0.3 * image_loss(present, mask.amax((1, 2, 3)))]
        optimizer.zero_grad()
        torch.stack(terms).sum().backward()
        optimizer.step()
    with torch.no_grad():
        x, mask = _discs(64)
        found, present = network.eval()(x)
    shown = mask.amax((1, 2, 3)) == 1
    assert soft_dice(found[shown] > 0, mask[shown]).mean() > 0.7
    assert ((present > 0) == shown).float().mean() > 0.85


def _discs(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Noisy images, most of which show a disc, and its mask."""
    at = torch.arange(size)
    (row, column, share), radius = torch.rand(3, count, 1, 1), 5 + 7 * torch.rand(count, 1, 1)
    off = (at[:, None] - size * (0.2 + 0.6 * row)).square() + (at - size * (0.2 + 0.6 * column)).square()
    mask = ((off < radius.square()) & (share < 0.7)).unsqueeze(1).to(torch.uint8)
    return (0.4 + 0.2 * mask + 0.1 * torch.randn(mask.shape)).clamp(0, 1), mask


@pytest.mark.parametrize("wrong", [{"backbone": "vgg16"}, {"attention": "yes"}])
def test_unknown_names_are_rejected(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected backbone"):
        UNet(**wrong)
